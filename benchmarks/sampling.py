"""Times sampling: dlm_jax and a PyTorch loop like the DiffuLLaMA reference implementation's, in turns in one run.

    python benchmarks/sampling.py                                    GPT-2 small, 256 tokens, 32 steps, float32: a CPU
    python benchmarks/sampling.py --model=gpt2-medium --dtype=bfloat16 --batch_size=8                              a GPU

Both have random weights. PyTorch computes full logits, sorts them for top-p and samples a token at every position and
step. Its policies are the reference implementation's: `random` reveals each masked token with probability 1/(t+1),
`confidence` ranks by the probability of the sampled token and has no top-p. dlm_jax has the same settings, without and
with the caches. Tokens per second count generated tokens. Writes benchmarks/results/sampling-MODEL-DEVICE-DTYPE.json.
"""

import argparse
import statistics
from collections.abc import Callable

import harness
import numpy as np
from harness import HF_CONFIGS, MASK_TOKEN_ID


def run_dlm_jax(args: argparse.Namespace, policy: str, cache: str = "none") -> Callable[[int], None]:
    """Returns a function of a seed that samples a batch and waits for it; with a cache in blocks of 32."""
    import jax
    from flax import nnx

    from dlm_jax.checkpoints import config_from_hf
    from dlm_jax.diffusion import DiffusionSpec
    from dlm_jax.matmul import choose_matmul
    from dlm_jax.models import Compute, Transformer
    from dlm_jax.sampling import SamplerConfig, SamplingSpec, sample

    compute = Compute(args.dtype, matmul=choose_matmul(args.dtype, jax.default_backend(), 1))
    model = nnx.jit(lambda: Transformer(config_from_hf(HF_CONFIGS[args.model]), rngs=nnx.Rngs(0),
                                        param_dtype=args.dtype, compute=compute))()
    config = SamplerConfig(policy=policy, num_steps=args.num_steps, temperature=args.temperature,
                           top_p=args.top_p if policy == "random" else None, cache=cache,
                           block_length=None if cache == "none" else 32)
    tokens = np.zeros((args.batch_size, args.length), np.int32)
    fixed = np.broadcast_to(np.arange(args.length) == 0, tokens.shape)
    lengths = np.full(args.batch_size, args.length)
    spec = SamplingSpec(config, DiffusionSpec(MASK_TOKEN_ID))

    def run(seed: int) -> None:
        keys = jax.random.split(jax.random.key(seed), args.batch_size)
        jax.block_until_ready(sample(model, tokens, fixed, lengths, keys, spec))

    return run


def run_pytorch(args: argparse.Namespace, policy: str) -> Callable[[int], None]:
    """Returns the same in PyTorch: all logits, sorted, and a token at every position of every step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = dict(HF_CONFIGS[args.model])
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa",
                                             dtype=getattr(torch, args.dtype)).to(device).eval()
    bias = torch.zeros(args.batch_size, 1, args.length, args.length, device=device, dtype=model.dtype)

    def apply_top_p(logits: "torch.Tensor") -> "torch.Tensor":
        values, order = torch.sort(logits, descending=True)
        beyond = torch.softmax(values, -1).cumsum(-1) > args.top_p
        beyond[..., 1:] = beyond[..., :-1].clone()
        beyond[..., 0] = False
        return logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)

    @torch.no_grad()
    def run(seed: int) -> None:
        torch.manual_seed(seed)
        gaps = torch.ones(args.batch_size, args.length, dtype=torch.bool, device=device)
        gaps[:, 0] = False
        masked = gaps.clone()
        tokens = torch.where(masked, MASK_TOKEN_ID, 0)
        for t in range(args.num_steps - 1, -1, -1):
            logits = model(tokens, attention_mask=bias, use_cache=False).logits.float() / args.temperature
            scores = torch.log_softmax(apply_top_p(logits) if policy == "random" else logits, -1)
            sampled = torch.distributions.Categorical(logits=scores).sample()
            score = scores.gather(-1, sampled[..., None])[..., 0]
            sampled = torch.cat([tokens[:, :1], sampled[:, :-1]], 1)
            if policy == "random":
                reveal = masked & (torch.rand(masked.shape, device=device) < 1 / (t + 1))
            else:
                score = torch.cat([score[:, :1], score[:, :-1]], 1).masked_fill(~gaps, -torch.inf)
                number = int(gaps.sum(1)[0] * (args.num_steps - t) / args.num_steps)
                best = score.topk(number, 1).indices
                reveal = masked & torch.zeros_like(masked).scatter(1, best, True)
                reveal |= masked if t == 0 else False
            tokens = torch.where(reveal, sampled, tokens)
            masked &= ~reveal
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    parser = harness.parser(__doc__, batch_size=1, length=256, num_steps=32, temperature=0.95, top_p=0.9,
                            repeats=3, threads=2)
    parser.add_argument("--model", choices=("gpt2-small", "gpt2-medium"), default="gpt2-small")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--policies", nargs="+", default=["random", "confidence"], choices=("random", "confidence"))
    parser.add_argument("--only", choices=("dlm_jax", "pytorch"), help="run one side alone")
    args = parser.parse_args()

    import jax

    generated = args.batch_size * (args.length - 1)
    results = []
    for policy in args.policies:
        sides = {name: make(args, policy) for name, make in (("dlm_jax", run_dlm_jax), ("pytorch", run_pytorch))
                 if args.only in (None, name)}
        if args.only != "pytorch":
            sides |= {f"dlm_jax, {cache} cache": run_dlm_jax(args, policy, cache) for cache in ("prefix", "dual")}
        for name, run in sides.items():
            if name != "pytorch":  # which compiles nothing
                run(0)
        for name, seconds in harness.time_in_turns(sides, args.repeats, warmup=0).items():
            median = statistics.median(seconds)
            results.append({"side": name, "policy": policy, "seconds": seconds, "median": median,
                            "tokens_per_second": generated / median})
    device = jax.devices()[0].device_kind
    print(f"{args.model}, {args.batch_size} x {args.length}, {args.num_steps} steps, {args.dtype}, {device}; "
          f"median of {args.repeats}")
    print("| policy | side | seconds | tokens/s | of PyTorch |\n| --- | --- | --- | --- | --- |")
    for row in results:
        other = [r for r in results if r["side"] == "pytorch" and r["policy"] == row["policy"]]
        row["ratio"] = row["tokens_per_second"] / other[0]["tokens_per_second"] if other else None
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        print(f"| {row['policy']} | {row['side']} | {row['median']:.2f} | {row['tokens_per_second']:.1f} | {ratio} |")
    harness.write_results(f"sampling-{args.model}-{harness.device_name()}-{args.dtype}",
                          {"settings": vars(args), "results": results}, "jax", "flax", "torch", "transformers")


if __name__ == "__main__":
    main()
