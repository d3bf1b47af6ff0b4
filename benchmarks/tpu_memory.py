"""The memory of Llama-2-7B's training step on a TPU slice, for any number of layers and length.

    python benchmarks/tpu_memory.py                                              v5e-256
    python benchmarks/tpu_memory.py --topology=v5p:2x2x4 --rows_a_chip=1
    python benchmarks/tpu_memory.py --context=8 --length=16384 --rows_a_chip=2

Each chip has `rows_a_chip` times 2048 tokens whatever the length: with --context=8, rows of 16,384 tokens over eight
chips. It compiles as `dlm plan` does, which needs `pip install 'dlm-jax[tpu]'` and no TPU. It adds the compiler's
figures for a chip's memory (the peak decides whether a program fits) to benchmarks/results/tpu_memory.json.
"""

import argparse
import dataclasses
import math
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import harness

from dlm_jax.data.config import DataConfig
from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.parallel import MeshConfig
from dlm_jax.plan import Plan, describe_base, make_plan, read_topology, tpu_target
from dlm_jax.training.config import ModelSource, OptimizerConfig, TrainConfig


def plan(args: argparse.Namespace) -> Plan:
    """Returns the plan for the arguments."""
    topology = read_topology(args.topology)
    chips = topology.slices * math.prod(topology.shape)
    config = TrainConfig(
        num_steps=1000, optimizer=OptimizerConfig(schedule="constant"),
        model=ModelSource("meta-llama/Llama-2-7b-hf", mask_token=811, dtype="bfloat16", remat=args.remat,
                          attention=args.attention),
        data=DataConfig(length=args.length, batch_size=args.rows_a_chip * 2048 * chips // args.length),
        mesh=MeshConfig(data=args.data, fsdp=-1, tensor=args.tensor, context=args.context),
        objective=ObjectiveConfig(anneal_steps=100 if args.anneal else 0))
    base, config = describe_base(config)
    changes = {"max_length": 1 << 17} | ({"num_layers": args.layers} if args.layers else {})
    base = dataclasses.replace(base, config=dataclasses.replace(base.config, **changes))
    return make_plan(config, base, tpu_target(config, base.config, args.topology))


def main() -> None:
    parser = harness.parser(__doc__, rows_a_chip=2, length=2048, data=1, tensor=1, context=1)
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model's 32, to try things")
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
    parser.add_argument("--attention", default="tpu", choices=("tpu", "xla"))
    parser.add_argument("--anneal", type=int, default=1, help="1: attention is being annealed; 0: bidirectional")
    args = parser.parse_args()
    started = time.perf_counter()
    found = plan(args)
    seconds = time.perf_counter() - started
    memory = found.memory
    result = {
        "settings": vars(args), "compile_seconds": seconds, "argument_gib": memory.breakdown.get("arguments"),
        "temp_gib": memory.breakdown.get("temporary"), "peak_gib": memory.needed, "fits": memory.fits,
        "sent": found.sent, "versions": harness.versions("jax", "libtpu"),
    }
    print(f"{found.target}: {found.num_chips} chips, rows of {args.length}: {memory.needed:.2f} of "
          f"{memory.limit:.2f} GiB a chip, {'fits' if memory.fits else 'does not fit'}; {seconds:.0f} s")
    known = [entry for entry in harness.read_json("tpu_memory", []) if entry["settings"] != result["settings"]]
    harness.write_json("tpu_memory", [*known, result])


if __name__ == "__main__":
    main()
