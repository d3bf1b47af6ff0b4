"""Llama-2-7B's training step on a TPU slice by hand: any number of layers, and rows longer than its positions.

    python benchmarks/tpu_memory.py                                              v5e-256
    python benchmarks/tpu_memory.py --topology=v5p:2x2x4 --rows_a_chip=1
    python benchmarks/tpu_memory.py --context=8 --length=16384 --rows_a_chip=2

`rows_a_chip` rows of 2048 tokens' worth lie on each chip whatever the length: with --context=8, rows of 16,384 tokens
over eight chips. It compiles as `dlm plan` does, with `pip install "dlm_jax[tpu]"` and no TPU, and adds what the
compiler says of a chip's memory (its peak decides whether a program fits) to benchmarks/results/tpu_memory.json.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"

from dlm_jax.data.config import DataConfig
from dlm_jax.parallel import MeshConfig
from dlm_jax.plan import Plan, describe_base, make_plan, read_topology, tpu_target
from dlm_jax.training.config import ModelSource, ObjectiveConfig, OptimizerConfig, TrainConfig

RESULTS = pathlib.Path(__file__).parent / "results" / "tpu_memory.json"


def plan(args: argparse.Namespace) -> Plan:
    """The plan that the arguments ask for."""
    chips = read_topology(args.topology).num_chips
    config = TrainConfig(
        num_steps=1000, optimizer=OptimizerConfig(schedule="constant"),
        model=ModelSource("meta-llama/Llama-2-7b-hf", mask_token=811, dtype="bfloat16", remat=args.remat,
                          attention=args.attention),
        data=DataConfig(length=args.length, batch_size=args.rows_a_chip * 2048 * chips // args.length),
        mesh=MeshConfig(data=args.data, fsdp=-1, tensor=args.tensor, context=args.context),
        objective=ObjectiveConfig(anneal_steps=100 if args.anneal else 0))
    base = describe_base(config.model)
    changes = {"max_length": 1 << 17} | ({"num_layers": args.layers} if args.layers else {})
    base = dataclasses.replace(base, config=dataclasses.replace(base.config, **changes))
    return make_plan(config, base, tpu_target(config, base.config, args.topology))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model's 32, to try things")
    parser.add_argument("--rows_a_chip", type=int, default=2, help="times 2048 tokens")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
    parser.add_argument("--attention", default="tpu", choices=("tpu", "xla"))
    parser.add_argument("--anneal", type=int, default=1, help="1: attention is being annealed; 0: bidirectional")
    args = parser.parse_args()
    found = plan(args)
    memory = found.memory
    result = {
        "settings": vars(args), "compile_seconds": found.compile_seconds, "argument_gib": memory.arguments,
        "temp_gib": memory.temporary, "peak_gib": memory.needed, "fits": memory.fits, "sent": found.sent,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }
    print(f"{found.target}: {found.num_chips} chips, {found.batch_size} rows of {found.length}: {memory.needed:.2f} of "
          f"{memory.limit:.2f} GiB a chip, {'fits' if memory.fits else 'does not fit'}; {found.compile_seconds:.0f} s")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = [entry for entry in known if entry["settings"] != result["settings"]]
    RESULTS.write_text(json.dumps([*known, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
