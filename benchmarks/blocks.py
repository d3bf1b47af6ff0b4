"""What a step of block diffusion costs beside the parent's and beside full diffusion's: the same model, in turns.

    python benchmarks/blocks.py                                                          a small GPT-2, float32: a CPU
    python benchmarks/blocks.py --hidden=768 --layers=12 --vocab=50258 --length=1024 --dtype=bfloat16            a GPU

All start from the same random weights and see the same tokens. Prints seconds a step (the median, and the median ratio
of neighbouring steps to the parent's, so that what else the machine does falls on both) and writes
benchmarks/results/blocks-cost-DEVICE.json.
"""

import argparse
import importlib.metadata
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dlm_jax.diffusion import Batch, ObjectiveConfig
from dlm_jax.models import Compute, ModelConfig, Transformer
from dlm_jax.parallel import MeshConfig, make_mesh
from dlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from dlm_jax.training.step import create_state, make_train_step

RESULTS = pathlib.Path(__file__).parent / "results"
OBJECTIVES = {
    "autoregressive": ObjectiveConfig(name="autoregressive"),
    "diffusion": ObjectiveConfig(),
    "blocks of 1": ObjectiveConfig(name="block_diffusion", block_size=1),
    "blocks of 4": ObjectiveConfig(name="block_diffusion", block_size=4),
    "blocks of 32": ObjectiveConfig(name="block_diffusion", block_size=32),
    "blocks of 32, complementary": ObjectiveConfig(name="block_diffusion", block_size=32, complementary=True),
}


def step_of(args: argparse.Namespace, objective: ObjectiveConfig) -> Callable[[], None]:
    """A function that takes one step and waits for it."""
    config = ModelConfig("gpt2", vocab_size=args.vocab, hidden_size=args.hidden, num_layers=args.layers,
                         num_heads=args.hidden // 64, num_kv_heads=args.hidden // 64, head_dim=64,
                         mlp_size=4 * args.hidden, max_length=args.length, norm="layer", positions="learned",
                         gated_mlp=False, activation="gelu_tanh", tie_embeddings=True, qkv_bias=True, out_bias=True,
                         mlp_bias=True)
    mesh, settings = make_mesh(MeshConfig(), jax.devices()[:1]), OptimizerConfig(schedule="constant")
    graphdef, params = nnx.split(Transformer(config, rngs=nnx.Rngs(0), compute=Compute(args.dtype)))
    rule = make_optimizer(settings, 10**6)
    state = create_state(params, rule, False, mesh)
    step = make_train_step(graphdef, rule, mesh, objective=objective, config=settings, num_steps=10**6, seed=0,
                           mask_token_id=0)
    tokens = np.random.default_rng(0).integers(0, args.vocab, (args.batch_size, args.length)).astype(np.int32)
    noisable_mask, number = np.broadcast_to(np.arange(args.length) > 0, tokens.shape), iter(range(10**9))

    def run() -> None:
        nonlocal state
        index = jnp.arange(args.batch_size, dtype=jnp.uint32) + next(number) * args.batch_size
        state, metrics = step(state, Batch(tokens, noisable_mask, index))
        jax.block_until_ready((state, metrics))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("vocab", 4096), ("length", 256), ("batch_size", 8),
                          ("steps", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    steps = {name: step_of(args, objective) for name, objective in OBJECTIVES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.steps + 1):
        for name, run in steps.items():
            began = time.perf_counter()
            run()
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - began)
    rows = {}
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, seconds["autoregressive"], strict=True))
        rows[name] = {"seconds": statistics.median(found), "of_autoregressive": ratio}
        print(f"{name:<28} {rows[name]['seconds']:8.4f} s  {ratio:6.2f} of autoregressive")
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = RESULTS / f"blocks-cost-{device}.json"
    path.write_text(json.dumps({
        "arguments": vars(args), "device": device, "steps": rows,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")}}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
