"""The time of one forward pass over a few tokens with a KV cache, beside the time to read the weights once.

    python benchmarks/decoding.py                            SmolLM2-135M's shape, random weights, batch 1
    python benchmarks/decoding.py --model=gpt2-small
    python benchmarks/decoding.py --llama_cpp                llama.cpp as well: pip install llama-cpp-python gguf

Decoding one token reads every weight once, so that the memory's bandwidth bounds it from below; a pass over 16 tokens,
as a draft is verified, should cost little more. All sides take turns, have random weights, and compute the
logits of all tokens of a pass. Bandwidth is that of a sum over 1 GiB. llama.cpp reads GGUF files in bfloat16 and Q8_0.
Prints milliseconds per pass, and writes benchmarks/results/decoding-MODEL-DEVICE.json.
"""

import argparse
import logging
import pathlib
import statistics
import tempfile
from collections.abc import Callable

import harness
import jax
import jax.numpy as jnp
import numpy as np
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


def llama_cpp(args: argparse.Namespace, dtype: str) -> Callable[[int], Callable[[int], object]]:
    import llama_cpp as c

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.gguf"
        write_gguf(path, HF_CONFIGS[args.model], dtype)
        params = c.llama_model_default_params()
        params.use_extra_bufts = False  # its AMX kernels for quantized matrices end in an illegal instruction (0.3.36)
        model = c.llama_model_load_from_file(str(path).encode(), params)
    vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 2 * CONTEXT, CONTEXT, CONTEXT
    params.n_threads = params.n_threads_batch = args.threads

    def passes(count: int) -> Callable[[int], object]:
        context = c.llama_init_from_model(model, params)

        def forward(start: int, number: int) -> np.ndarray:
            batch = c.llama_batch_init(number, 0, 1)
            batch.n_tokens = number
            for i in range(number):
                batch.token[i], batch.pos[i], batch.logits[i] = 1, start + i, True
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if c.llama_decode(context, batch):
                raise RuntimeError("llama.cpp cannot decode the batch")
            c.llama_batch_free(batch)
            return np.ctypeslib.as_array(c.llama_get_logits(context), (number, vocab_size)).argmax(-1)

        forward(0, CONTEXT)

        def run(_: int) -> None:
            forward(CONTEXT, count)
            c.llama_memory_seq_rm(c.llama_get_memory(context), 0, CONTEXT, -1)

        return run

    return passes


def write_gguf(path: pathlib.Path, config: dict[str, object], dtype: str) -> None:
    """Writes a LLaMA of random weights, its matrices in `dtype`, without a tokenizer."""
    import gguf

    kind = {"bfloat16": gguf.GGMLQuantizationType.BF16, "Q8_0": gguf.GGMLQuantizationType.Q8_0}[dtype]
    embed, layers, mlp = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    heads, kv_heads, vocab_size = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    kv = embed // heads * kv_heads
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(embed)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("none")

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            return writer.add_tensor(name, np.ones(shape, np.float32))
        matrix = 0.02 * rng.standard_normal(shape, np.float32)
        return writer.add_tensor(name, gguf.quantize(matrix, kind), raw_dtype=kind)

    add("token_embd.weight", vocab_size, embed)
    add("output_norm.weight", embed)
    for i in range(layers):
        for name, *shape in (("attn_norm", embed), ("attn_q", embed, embed), ("attn_k", kv, embed),
                             ("attn_v", kv, embed), ("attn_output", embed, embed), ("ffn_norm", embed),
                             ("ffn_gate", mlp, embed), ("ffn_up", mlp, embed), ("ffn_down", embed, mlp)):
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bandwidth() -> float:
    """Returns the bytes per second that a sum over 1 GiB reads."""
    x, total = jnp.ones(2**28, jnp.float32), jax.jit(jnp.sum)
    seconds = harness.time_in_turns({"read": lambda _: jax.block_until_ready(total(x))}, 5)["read"]
    return x.nbytes / min(seconds)


def main() -> None:
    parser = harness.parser(__doc__, repeats=15, threads=2)
    parser.add_argument("--model", choices=HF_CONFIGS, default="smollm2-135m")
    parser.add_argument("--llama_cpp", action="store_true", help="measure llama.cpp too, of a model of LLaMA's kind")
    args = parser.parse_args()
    if args.llama_cpp and HF_CONFIGS[args.model]["model_type"] != "llama":
        parser.error(f"--llama_cpp writes files of LLaMA's kind only, and {args.model} is of another")
    from dlm_jax.checkpoints import config_from_hf
    from dlm_jax.training.flops import count_params

    read, size = bandwidth(), count_params(config_from_hf(HF_CONFIGS[args.model]))
    sides = {f"{name}, {dtype}": make(args, dtype) for name, make in (("ours", ours), ("PyTorch", pytorch))
             for dtype in ("bfloat16", "float32")}
    if args.llama_cpp:
        sides |= {f"llama.cpp, {dtype}": llama_cpp(args, dtype) for dtype in ("bfloat16", "Q8_0")}
    results = {name: {} for name in sides}
    for count in TOKENS:
        runs = {name: side(count) for name, side in sides.items()}
        for name, seconds in harness.time_in_turns(runs, args.repeats, warmup=2).items():
            results[name][count] = 1e3 * statistics.median(seconds)
    bytes_per_weight = {"bfloat16": 2, "float32": 4, "Q8_0": 34 / 32}
    bound = {dtype: 1e3 * width * size / read for dtype, width in bytes_per_weight.items()}
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
