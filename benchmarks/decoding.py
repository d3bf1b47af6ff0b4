"""The time of one forward pass over a few tokens with a KV cache, beside the time to read the weights once.

    python benchmarks/decoding.py                            SmolLM2-135M's shape, random weights, batch 1
    python benchmarks/decoding.py --model=gpt2-small

Decoding one token reads every weight once, so that the memory's bandwidth bounds it from below; a pass over 16 tokens,
as a draft is verified, should cost little more. Ours and PyTorch's take turns. Bandwidth is that of a copy of 1 GiB.
Prints milliseconds per pass, and writes benchmarks/results/decoding-MODEL-DEVICE.json.
"""

import argparse
import statistics
from collections.abc import Callable

import harness
import jax
import jax.numpy as jnp
from harness import HF_CONFIGS

CONTEXT = 128  # tokens in the cache
TOKENS = (1, 4, 16, 64)  # of a pass


def ours(args: argparse.Namespace, dtype: str) -> Callable[[int], Callable[[int], object]]:
    """Returns a function from a number of tokens to a function that runs one pass over as many."""
    from flax import nnx

    from dlm_jax.attention import AttentionMask
    from dlm_jax.checkpoints import config_from_hf
    from dlm_jax.matmul import choose_matmul, jit_model
    from dlm_jax.models import Cache, Compute, Transformer

    config = config_from_hf(HF_CONFIGS[args.model])
    compute = Compute(dtype, matmul=choose_matmul(dtype, jax.default_backend(), 1))
    model = nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype), compute=compute))()
    graphdef, params = nnx.split(model)

    def decode(graphdef: object, params: object, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        model, positions = nnx.merge(graphdef, params), CONTEXT + jnp.arange(tokens.shape[1])[None]
        hidden, cache = model.cached_hidden(tokens, AttentionMask.causal(), positions, cache)
        return jnp.argmax(model.unembed(hidden), axis=-1), cache

    program = jit_model(decode, static_argnames="graphdef", donate_argnames="cache")

    def passes(count: int) -> Callable[[int], object]:
        cache = Cache.empty(config, 1, 2 * CONTEXT, dtype)
        tokens = jnp.ones((1, count), jnp.int32)

        def run(_: int) -> None:
            nonlocal cache
            found, cache = program(graphdef, params, tokens, cache)
            jax.block_until_ready(found)

        return run

    return passes


def pytorch(args: argparse.Namespace, dtype: str) -> Callable[[int], Callable[[int], object]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(args.threads)
    config = dict(HF_CONFIGS[args.model])
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()

    def passes(count: int) -> Callable[[int], object]:
        cache, tokens = DynamicCache(config=config), torch.ones((1, count), dtype=torch.long)
        with torch.inference_mode():
            model(torch.ones((1, CONTEXT), dtype=torch.long), past_key_values=cache)

        def run(_: int) -> None:
            with torch.inference_mode():
                model(tokens, past_key_values=cache).logits.argmax(-1)
                cache.crop(-count)

        return run

    return passes


def bandwidth() -> float:
    """Returns the bytes per second that a sum over 1 GiB reads."""
    x, total = jnp.ones(2**28, jnp.float32), jax.jit(jnp.sum)
    seconds = harness.time_in_turns({"read": lambda _: jax.block_until_ready(total(x))}, 5)["read"]
    return x.nbytes / min(seconds)


def main() -> None:
    parser = harness.parser(__doc__, repeats=15, threads=2)
    parser.add_argument("--model", choices=HF_CONFIGS, default="smollm2-135m")
    args = parser.parse_args()
    from dlm_jax.checkpoints import config_from_hf
    from dlm_jax.training.metrics import count_params

    read, size = bandwidth(), count_params(config_from_hf(HF_CONFIGS[args.model]))
    sides = {f"{name}, {dtype}": make(args, dtype) for name, make in (("ours", ours), ("PyTorch", pytorch))
             for dtype in ("bfloat16", "float32")}
    results = {name: {} for name in sides}
    for count in TOKENS:
        runs = {name: side(count) for name, side in sides.items()}
        for name, seconds in harness.time_in_turns(runs, args.repeats, warmup=2).items():
            results[name][count] = 1e3 * statistics.median(seconds)
    bound = {"bfloat16": 2e3 * size / read, "float32": 4e3 * size / read}
    print(f"{args.model}, batch 1, {CONTEXT} tokens in the cache; memory is read at {read / 1e9:.1f} GB/s: the weights "
          f"in {bound['bfloat16']:.0f} ms as bfloat16, {bound['float32']:.0f} ms as float32")
    print(harness.table_head("ms per pass of", *(f"{count} tokens" for count in TOKENS), "16 tokens / 1",
                             "1 token / reading the weights"))
    for name, times in results.items():
        print(harness.row(name, *(f"{times[count]:.1f}" for count in TOKENS), f"{times[16] / times[1]:.2f}",
                          f"{times[1] / bound[name.split(', ')[1]]:.2f}"))
    harness.write_results(f"decoding-{args.model}-{harness.device_name()}", {
        "settings": vars(args), "bandwidth": read, "parameters": size, "milliseconds": results}, "jax", "torch",
        "transformers")


if __name__ == "__main__":
    main()
