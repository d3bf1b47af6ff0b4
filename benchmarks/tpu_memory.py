"""What a training step needs on a TPU slice, by compiling it for one; no TPU is needed, only `pip install jax[tpu]`.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/tpu_memory.py                       Llama-2-7B, v5e-256
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/tpu_memory.py --topology=v5p:2x2x4 --rows_a_chip=1
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/tpu_memory.py --context=8 --length=16384 --rows_a_chip=2

`rows_a_chip` rows of 2048 tokens' worth lie on each chip whatever the length: with --context=8, rows of 16,384 tokens
over eight chips. Reports XLA's memory analysis of a chip (its peak decides whether a program fits) and compile seconds,
and adds a line to benchmarks/results/tpu_memory.json.
"""

import argparse
import importlib.metadata
import json
import pathlib
import time

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from dlm_jax.data.batch import Batch
from dlm_jax.hf import config_from_hf
from dlm_jax.models import Compute, abstract_model
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig, array_sharding, make_mesh
from dlm_jax.training.objective import ObjectiveConfig
from dlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from dlm_jax.training.state import state_layout
from dlm_jax.training.step import make_train_step

RESULTS = pathlib.Path(__file__).parent / "results" / "tpu_memory.json"
LLAMA2_7B = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 1 << 17,
             "rms_norm_eps": 1e-5, "vocab_size": 32000, "tie_word_embeddings": False}
GIB = 1 << 30


def lower(args: argparse.Namespace) -> jax.stages.Lowered:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    mesh = make_mesh(MeshConfig(data=args.data, fsdp=-1, tensor=args.tensor, context=args.context), devices)
    model_config = config_from_hf(LLAMA2_7B | ({"num_hidden_layers": args.layers} if args.layers else {}))
    model = abstract_model(model_config, Compute("bfloat16", args.remat, args.attention, ATTENTION_PARTITION))
    graphdef, params = nnx.split(model)
    optimizer_config = OptimizerConfig(schedule="constant")
    optimizer = make_optimizer(optimizer_config, 1000)
    step = make_train_step(graphdef, optimizer, mesh, num_steps=1000, seed=0, mask_token_id=811,
                           objective=ObjectiveConfig(anneal_steps=100 if args.anneal else 0), config=optimizer_config)
    rows = args.rows_a_chip * 2048 * len(devices) // args.length
    of = lambda dtype, *axes: jax.ShapeDtypeStruct(  # noqa: E731
        (rows, args.length)[:len(axes)], dtype, sharding=array_sharding(mesh, *axes))
    batch = Batch(of(jnp.int32, "batch", "length"), of(jnp.bool_, "batch", "length"), of(jnp.uint32, "batch"))
    print(f"{args.topology}: {len(devices)} chips, mesh {dict(mesh.shape)}, {rows} rows of {args.length}", flush=True)
    with jax.set_mesh(mesh):
        return step.lower(state_layout(params, optimizer, False, mesh), batch)


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
    parser.add_argument("--attention", default="flash_tpu", choices=("flash_tpu", "dense"))
    parser.add_argument("--anneal", type=int, default=1, help="1: attention is being annealed; 0: bidirectional")
    args = parser.parse_args()
    began = time.perf_counter()
    lowered = lower(args)
    middle = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    result = {
        "settings": vars(args), "lower_seconds": middle - began, "compile_seconds": time.perf_counter() - middle,
        "argument_gib": memory.argument_size_in_bytes / GIB, "temp_gib": memory.temp_size_in_bytes / GIB,
        "peak_gib": memory.peak_memory_in_bytes / GIB,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }
    print(f"arguments {result['argument_gib']:.2f} GiB, temp {result['temp_gib']:.2f} GiB, "
          f"peak {result['peak_gib']:.2f} GiB a chip; compiled in {result['compile_seconds']:.0f} s")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = [entry for entry in known if entry["settings"] != result["settings"]]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([*known, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
