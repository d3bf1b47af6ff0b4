"""What a step of block diffusion costs compared with autoregressive and full diffusion training of the same model.

    python benchmarks/blocks.py                                                          a small GPT-2, float32: a CPU
    python benchmarks/blocks.py --hidden=768 --layers=12 --vocab=50258 --length=1024 --dtype=bfloat16            a GPU

All start from the same random weights and see the same tokens. Prints seconds per step (the median, and the
median ratio to the neighboring autoregressive step, so that other load on the machine affects both) and writes
benchmarks/results/blocks-cost-DEVICE.json.
"""

import argparse
import statistics

import harness
from flax import nnx

from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.models import Compute, ModelConfig, Transformer
from dlm_jax.training.optimizer import OptimizerConfig

OBJECTIVES = {
    "autoregressive": ObjectiveConfig(name="autoregressive"),
    "diffusion": ObjectiveConfig(),
    "blocks of 1": ObjectiveConfig(name="block_diffusion", block_size=1),
    "blocks of 4": ObjectiveConfig(name="block_diffusion", block_size=4),
    "blocks of 32": ObjectiveConfig(name="block_diffusion", block_size=32),
    "blocks of 32, complementary": ObjectiveConfig(name="block_diffusion", block_size=32, complementary=True),
}


def step_of(args: argparse.Namespace, objective: ObjectiveConfig) -> harness.TrainStep:
    config = ModelConfig("gpt2", vocab_size=args.vocab, hidden_size=args.hidden, num_layers=args.layers,
                         num_heads=args.hidden // 64, num_kv_heads=args.hidden // 64, head_dim=64,
                         mlp_size=4 * args.hidden, max_length=args.length, norm="layer", positions="learned",
                         gated_mlp=False, activation="gelu_tanh", tie_embeddings=True, qkv_bias=True, out_bias=True,
                         mlp_bias=True)
    model = nnx.split(Transformer(config, rngs=nnx.Rngs(0), compute=Compute(args.dtype)))
    return harness.TrainStep(*model, harness.random_tokens(args.vocab, args.batch_size, args.length), objective,
                             OptimizerConfig(schedule="constant"))


def main() -> None:
    parser = harness.parser(__doc__, hidden=256, layers=4, vocab=4096, length=256, batch_size=8, steps=12)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    seconds = harness.time_in_turns({name: step_of(args, one) for name, one in OBJECTIVES.items()}, args.steps)
    rows = {}
    for name, found in seconds.items():
        ratio = harness.median_ratio(found, seconds["autoregressive"])
        rows[name] = {"seconds": statistics.median(found), "of_autoregressive": ratio}
        print(f"{name:<28} {rows[name]['seconds']:8.4f} s  {ratio:6.2f} of autoregressive")
    harness.write_results(f"blocks-cost-{harness.device_name()}", {"arguments": vars(args), "steps": rows},
                          "jax", "flax")


if __name__ == "__main__":
    main()
