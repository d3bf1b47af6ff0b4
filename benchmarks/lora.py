"""What a LoRA step costs in time and memory, with the base in several dtypes, compared with full training of the same
model; and what quantizing the base does to the loss.

    python benchmarks/lora.py                                                       a small LLaMA, float32: a CPU
    python benchmarks/lora.py --hidden=2048 --layers=16 --batch_size=8 --length=1024 --dtype=bfloat16       a GPU

All start from the same random weights and see the same tokens. Prints seconds per step (the median, and the
median ratio of neighboring steps, so that other load affects both), and the autoregressive loss of the shipped base on
its held-out stories; writes benchmarks/results/lora-DEVICE.json.
"""

import argparse
import dataclasses
import json
import statistics

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import load_pretrained
from dlm_jax.diffusion import ObjectiveConfig
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
from dlm_jax.training.optimizer import OptimizerConfig
from dlm_jax.training.state import Frozen


def step_of(args: argparse.Namespace, lora: LoRAConfig | None) -> tuple[harness.TrainStep, dict[str, float]]:
    """Returns a training step, and the bytes of its state by kind."""
    config = ModelConfig("llama", vocab_size=args.vocab, hidden_size=args.hidden, num_layers=args.layers,
                         num_heads=args.hidden // 64, num_kv_heads=args.hidden // 64, head_dim=64,
                         mlp_size=11 * args.hidden // 4, max_length=args.length)
    graphdef, shapes = base_shapes(config, Compute(args.dtype, args.remat), "float32", lora)
    base = nnx.state(nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))())
    states = [freeze_base(((path, shape.replace(x[...].astype(shape.dtype))) for (path, x), (_, shape) in
                      zip(nnx.to_flat_state(base), nnx.to_flat_state(shapes), strict=True)), lora)[0]]
    if lora is not None:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        states.append(init_lora_factors(config, lora, 0, "float32", place))
    graphdef, params, frozen = split_trainable(add_dora_magnitudes(nnx.merge(graphdef, *states)))
    step = harness.TrainStep(graphdef, params, harness.random_tokens(args.vocab, args.batch_size, args.length),
                             ObjectiveConfig(anneal_steps=0),
                             OptimizerConfig(learning_rate=1e-4, schedule="constant"), frozen=Frozen(frozen))
    size = lambda tree: sum(  # noqa: E731
        leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) // 8 for leaf in jax.tree.leaves(tree))
    state = step.state
    return step, {"trained": size(state.params), "frozen": size(state.frozen), "optimizer": size(state.opt_state)}


def held_out_loss(lora: LoRAConfig | None) -> float:
    """Returns the autoregressive loss of the shipped base, nats per token, on its held-out stories."""
    base = load_pretrained(harness.ROOT / "assets" / "stories-gpt2", lora=lora)
    lines = (harness.ROOT / "assets" / "stories-text" / "heldout.jsonl").read_text().splitlines()
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
    parser = harness.parser(__doc__, hidden=256, layers=4, vocab=4096, length=128, batch_size=8, rank=16, steps=12)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    args = parser.parse_args()
    lora = LoRAConfig(rank=args.rank, alpha=2.0 * args.rank)
    variants = {"full": None, "lora": lora, "lora, whole embedding": dataclasses.replace(lora, embedding=True),
                "lora, dora": dataclasses.replace(lora, dora=True),
                **{f"lora, {kind}": dataclasses.replace(lora, frozen_dtype=kind) for kind in QUANTIZED}}
    steps = {name: step_of(args, one) for name, one in variants.items()}
    seconds = harness.time_in_turns({name: run for name, (run, _) in steps.items()}, args.steps)
    rows = {}
    for name, (_, held) in steps.items():
        of_full, of_lora = (harness.median_ratio(seconds[name], seconds[other]) for other in ("full", "lora"))
        rows[name] = {"seconds": statistics.median(seconds[name]), "of_full": of_full, "of_lora": of_lora,
                      "bytes": held}
        print(f"{name:<22} {rows[name]['seconds']:8.4f} s  {of_full:6.3f} of full  {of_lora:6.3f} of lora  "
              + "  ".join(f"{part} {size / 2**20:,.1f} MiB" for part, size in held.items()))
    six = dataclasses.replace(lora, rank=1, targets=("q", "k", "v", "out", "up", "down"))  # changes nothing
    losses = {kind: held_out_loss(dataclasses.replace(six, frozen_dtype=kind))
              for kind in ("float32", "bfloat16", *QUANTIZED)}
    print("held-out loss  " + "  ".join(f"{kind} {loss:.5f}" for kind, loss in losses.items()))
    harness.write_results(f"lora-{harness.device_name()}",
                          {"arguments": vars(args), "steps": rows, "held_out_loss": losses}, "jax", "flax")


if __name__ == "__main__":
    main()
