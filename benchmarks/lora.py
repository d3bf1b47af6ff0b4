"""A training step with LoRA, beside bases in several types, and the full step of the same model, in turns; what each
holds, and what quantizing the base does to the loss.

    python benchmarks/lora.py                                                       a small LLaMA, float32: a CPU
    python benchmarks/lora.py --hidden=2048 --layers=16 --batch_size=8 --length=1024 --dtype=bfloat16       a GPU

All start from the same random weights and see the same tokens. Prints seconds a step (the median, and the median ratio
of neighbouring steps, so that what else the machine does falls on both), and of the shipped base the loss on its
held-out stories, left to right; writes benchmarks/results/lora-DEVICE.json.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import load_pretrained
from dlm_jax.diffusion import Batch, ObjectiveConfig
from dlm_jax.models import (
    Compute,
    LoRAConfig,
    ModelConfig,
    Transformer,
    add_dora_magnitudes,
    base_shapes,
    freeze_base,
    init_lora_factors,
    split_trainable,
)
from dlm_jax.models.lora import QUANTIZED
from dlm_jax.parallel import MeshConfig, make_mesh
from dlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from dlm_jax.training.step import create_state, make_train_step

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def step_of(args: argparse.Namespace, lora: LoRAConfig | None) -> tuple[Callable[[], None], dict[str, float]]:
    """A function that takes one step and waits for it, and bytes of the state by what they are of."""
    config = ModelConfig("llama", vocab_size=args.vocab, hidden_size=args.hidden, num_layers=args.layers,
                         num_heads=args.hidden // 64, num_kv_heads=args.hidden // 64, head_dim=64,
                         mlp_size=11 * args.hidden // 4, max_length=args.length)
    compute, mesh = Compute(args.dtype, args.remat), make_mesh(MeshConfig(), jax.devices()[:1])
    graphdef, shapes = base_shapes(config, compute, "float32", lora)
    base = nnx.state(nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))())
    states = [freeze_base(((path, shape.replace(x[...].astype(shape.dtype))) for (path, x), (_, shape) in
                      zip(nnx.to_flat_state(base), nnx.to_flat_state(shapes), strict=True)), lora)[0]]
    if lora is not None:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        states.append(init_lora_factors(config, lora, 0, "float32", place))
    graphdef, params, frozen = split_trainable(add_dora_magnitudes(nnx.merge(graphdef, *states)))
    settings = OptimizerConfig(learning_rate=1e-4, schedule="constant")
    rule = make_optimizer(settings, 10**6)
    state = create_state(params, rule, False, mesh, frozen=frozen)
    size = lambda tree: sum(  # noqa: E731
        leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) // 8 for leaf in jax.tree.leaves(tree))
    held = {"trained": size(state.params), "frozen": size(state.frozen), "optimizer": size(state.opt_state)}
    step = make_train_step(graphdef, rule, mesh, objective=ObjectiveConfig(anneal_steps=0), config=settings,
                           num_steps=10**6, seed=0, mask_token_id=0)
    tokens = np.random.default_rng(0).integers(0, args.vocab, (args.batch_size, args.length)).astype(np.int32)
    noisable_mask = np.broadcast_to(np.arange(args.length) > 0, tokens.shape)
    number = iter(range(10**9))

    def run() -> None:
        nonlocal state
        index = jnp.arange(args.batch_size, dtype=jnp.uint32) + next(number) * args.batch_size
        state, metrics = step(state, Batch(tokens, noisable_mask, index))
        jax.block_until_ready((state, metrics))

    return run, held


def held_out_loss(lora: LoRAConfig | None) -> float:
    """Nats per token of the shipped base, left to right, on the first 256 tokens of its held-out stories."""
    base = load_pretrained(ROOT / "assets" / "stories-gpt2", lora=lora)
    lines = (ROOT / "assets" / "stories" / "heldout.jsonl").read_text().splitlines()
    rows = [base.tokenizer.encode(json.loads(line)["text"])[:256] for line in lines]
    tokens = np.zeros((len(rows), 256), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    loss_mask = np.arange(1, 256) < np.array([len(ids) for ids in rows])[:, None]
    graphdef, state = nnx.split(base.model)

    @jax.jit
    def nll(state: nnx.State) -> jax.Array:
        logits = nnx.merge(graphdef, state)(tokens, AttentionMask.causal())[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)[..., 0]

    return float(np.asarray(nll(state))[loss_mask].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("vocab", 4096), ("length", 128), ("batch_size", 8),
                          ("rank", 16), ("steps", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    args = parser.parse_args()
    lora = LoRAConfig(rank=args.rank, alpha=2.0 * args.rank)
    variants = {"full": None, "lora": lora, "lora, whole embedding": dataclasses.replace(lora, embedding=True),
                "lora, dora": dataclasses.replace(lora, dora=True),
                **{f"lora, {kind}": dataclasses.replace(lora, frozen_dtype=kind) for kind in QUANTIZED}}
    steps = {name: step_of(args, one) for name, one in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.steps + 1):
        for name, (run, _) in steps.items():
            began = time.perf_counter()
            run()
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - began)
    rows = {}
    for name, (_, held) in steps.items():
        of_full, of_lora = (statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))
                            for other in ("full", "lora"))
        rows[name] = {"seconds": statistics.median(seconds[name]), "of_full": of_full, "of_lora": of_lora,
                      "bytes": held}
        print(f"{name:<22} {rows[name]['seconds']:8.4f} s  {of_full:6.3f} of full  {of_lora:6.3f} of lora  "
              + "  ".join(f"{part} {size / 2**20:,.1f} MiB" for part, size in held.items()))
    six = dataclasses.replace(lora, rank=1, targets=("q", "k", "v", "out", "up", "down"))  # new: it changes nothing
    losses = {kind: held_out_loss(dataclasses.replace(six, frozen_dtype=kind))
              for kind in ("float32", "bfloat16", *QUANTIZED)}
    print("held-out loss  " + "  ".join(f"{kind} {loss:.5f}" for kind, loss in losses.items()))
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = RESULTS / f"lora-{device}.json"
    path.write_text(json.dumps({"arguments": vars(args), "device": device, "steps": rows,
                                "held_out_loss": losses}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
