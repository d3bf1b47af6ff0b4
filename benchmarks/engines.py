"""Diffusion models in the programs of others: their own PyTorch code, SDAR's sampler, and llama.cpp.

    pip install --target=OLD --no-deps transformers==4.52.4 tokenizers==0.21.4 huggingface_hub==0.34.4
    pip install --target=NEW --no-deps transformers==4.57.3 tokenizers==0.22.1 huggingface_hub==0.36.0
    python benchmarks/engines.py --code=CODE --old=OLD --new=NEW
    python benchmarks/engines.py --model=smollm2.gguf --llama_cpp=PYTHON --converter=convert_hf_to_gguf.py \\
        [--diffusion_cli=llama-diffusion-cli]

CODE is a folder with the code of the models' authors; tests/checkpoints/make_diffusion_goldens.py says which files of
which repositories, and runs it. PYTHON is an interpreter that has llama-cpp-python; the converter and
llama-diffusion-cli are of the same llama.cpp, whose source is in the source package of llama-cpp-python. All models are
random:

1. Each family's own code computes the logits of a model of two layers as its authors publish it, beside this library.
2. A Qwen3 and a Qwen3-MoE with SDAR's vocabulary are exported in the layout `sdar`. The modeling code of SDAR and
   SDAR-MoE loads them; logits, and the text of SDAR's generate.py at temperature 0. AutoConfig of OLD and of the
   installed transformers reads their config.json.
3. A Qwen2 is exported in the layout `dream`, a Qwen3-MoE for transformers, and more with what RND1, LLaDA-MoE and LLaDA
   have in config.json, all with the tokenizer of --model. llama.cpp's converter makes GGUF files; logits in llama.cpp,
   and in this library from the file.
4. llama-diffusion-cli answers a prompt with the `dream` file, in the tokenizer's chat template. With --top-k 1 all of
   its candidates have the probability 1, so that it reveals from left to right; this library's logits, revealed so,
   give the text beside it.

Each call measures what its arguments allow. Prints tables, and writes benchmarks/results/engines.json, which keeps the
parts that a call does not measure.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping

import harness
import jax
import numpy as np
from flax import nnx

from dlm_jax import AttentionMask, DiffusionLM
from dlm_jax.checkpoints import Pretrained, load_pretrained
from dlm_jax.diffusion import BlockSpec, DiffusionSpec
from dlm_jax.random import example_keys
from dlm_jax.sampling import SamplerConfig, SamplingSpec, sample

OLD = ("dream", "llada", "llada_moe", "sdar", "sdar_moe")  # whose code needs transformers 4.52
NEW = ("rnd1", "a2d-qwen3", "a2d-qwen2", "a2d-llama")  # and 4.57
SDAR_MASK, SDAR_BLOCKS = 151669, BlockSpec(4, "block_bidirectional")
SDAR_RULES = {"static": dict(policy="confidence", num_steps=999), "dynamic": dict(policy="threshold", threshold=0.2)}
SIZES = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 256, "max_position_embeddings": 512, "initializer_range": 0.08, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96}
ROW, MASKED = 24, 8  # tokens of a text, and how many of them are masked
PROMPT, LENGTH, STEPS, EPS = "Once upon a time", 96, 16, 1e-3

_SDAR = """
import sys
from pathlib import Path
import numpy as np, torch
from tests.checkpoints import make_diffusion_goldens as own
folder, code, given, output = map(Path, sys.argv[2:])
given = np.load(given)
with torch.inference_mode():
    load = {"sdar": own.load_sdar, "sdar_moe": own.load_sdar_moe}[sys.argv[1]]
    model = load(folder, code / own.RUNS[sys.argv[1]][1])
    np.savez(output, **own.sdar_results(model, code / "SDAR/generate.py", given["tokens"], given["prompt"],
                                        int(given["mask"])))
"""
_CONFIG = """
import json, os, sys
os.environ["HF_MODULES_CACHE"] = sys.argv[2]
import transformers
config = transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
print("RESULT" + json.dumps([transformers.__version__, config.rope_theta, config.rope_scaling]))
"""
# Special buffers for matrices (AMX) are off: where a kernel does not allow them, llama.cpp dies.
_LLAMA_CPP = """
import sys
import llama_cpp as L, numpy as np

model_path, given, output = sys.argv[1:]
tokens = np.load(given)
L.llama_backend_init()
options = L.llama_model_default_params()
options.use_extra_bufts = False
model = L.llama_model_load_from_file(model_path.encode(), options)
settings = L.llama_context_default_params()
settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
settings.type_k = settings.type_v = 0  # float32
settings.flash_attn_type = 0  # it rounds to float16
settings.n_threads = settings.n_threads_batch = 1
vocab_size = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
rows = []
for row in tokens:
    context = L.llama_init_from_model(model, settings)
    batch = L.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for i, token in enumerate(row):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = int(token), i, 1, 0, 1
    assert L.llama_decode(context, batch) == 0
    rows.append(np.ctypeslib.as_array(L.llama_get_logits(context), (len(row), vocab_size)).copy())
    L.llama_free(context)
np.save(output, np.stack(rows))
"""


def run(command: list[object], *paths: str) -> str:
    """Runs a program; `paths` and this repository precede the installed packages. Returns what it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(harness.ROOT)]),
                                "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([str(part) for part in command], env=environment, cwd=harness.ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    printed = done.stdout.decode(errors="ignore")
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {printed[-2000:]}")
    return printed


def compare(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    return {"largest_logit": float(np.abs(expected).max()), "largest_difference": float(np.abs(found - expected).max())}


def cells(result: Mapping[str, float]) -> tuple[str, str]:
    return f"{result['largest_logit']:.1f}", f"{result['largest_difference']:.1e}"


def own_code(code: pathlib.Path, versions: Mapping[str, tuple[str, ...]], root: pathlib.Path) -> dict[str, object]:
    """Returns how far logits are from those of each family's own code; `versions` are folders of transformers."""
    from tests.checkpoints import diffusion_files as files

    results, tokens = {}, files.noisy_tokens()
    root.mkdir()
    print(harness.table_head("its own code", "largest logit", "largest difference"))
    for path, families in versions.items():
        run([sys.executable, "-m", "tests.checkpoints.make_diffusion_goldens", f"--code={code}", "--output",
             output := root / f"{families[0]}.npz", "--families", *families], path)
        goldens = np.load(output)
        for family in families:
            files.write(family, folder := root / f"{family}-mdlm")
            lm = DiffusionLM.from_pretrained(folder, mask_token=files.MASK)
            blocks = lm.pretrained.diffusion.blocks
            attention = AttentionMask.bidirectional() if blocks is None else blocks.prefill_mask()
            found = compare(lm.logits(tokens, attention=attention), goldens[f"{family}/logits"])
            if f"{family}/block_logits" in goldens:
                attention = BlockSpec(8, "block_bidirectional").prefill_mask()
                in_blocks = compare(lm.logits(tokens, attention=attention), goldens[f"{family}/block_logits"])
                found = {name: max(found[name], in_blocks[name]) for name in found}
            results[family] = found
            print(harness.row(family, *cells(found)))
    return results


def random_model(folder: pathlib.Path, config: dict[str, object], tokenizer: object) -> Pretrained:
    """Returns a model with random weights, biases and norms, and the tokenizer with a mask token."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    pretrained = load_pretrained(folder, mask_token="<|mask|>", init="random")
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(nnx.state(pretrained.model)))))
    nnx.update(pretrained.model, jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape, x.dtype), nnx.state(pretrained.model)))
    return pretrained


def masked_rows(vocab_size: int, mask: int) -> np.ndarray:
    """Returns two rows of random tokens, some of them masked."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, min(vocab_size, mask), (2, ROW))
    tokens[:, rng.permutation(np.arange(1, ROW))[:MASKED]] = mask
    return tokens


def sdar_tokenizer() -> object:
    """Returns a tokenizer of few words whose ids end where those of Qwen3 do."""
    import tokenizers
    import transformers

    words = {"a": 0, "b": 1, "<|endoftext|>": 151643, "</think>": SDAR_MASK - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def sdar_export(name: str, code: pathlib.Path, old: str, root: pathlib.Path) -> dict[str, object]:
    """Returns how an export as `sdar` or `sdar_moe` differs in SDAR's own code."""
    experts = EXPERTS | {"norm_topk_prob": True} if name == "sdar_moe" else {}
    config = SIZES | experts | {"model_type": name.replace("sdar", "qwen3"), "hidden_size": 64, "head_dim": 24,
                                "vocab_size": 151936, "rope_theta": 1e6, "tie_word_embeddings": True}
    pretrained = random_model(root / "base", config, sdar_tokenizer())
    lm = DiffusionLM(dataclasses.replace(pretrained, diffusion=DiffusionSpec(SDAR_MASK, False, SDAR_BLOCKS)))
    lm.save_pretrained(root / "sdar", layout="sdar")
    tokens, prompt = masked_rows(SDAR_MASK, SDAR_MASK), np.random.default_rng(1).integers(3, SDAR_MASK, 6)
    np.savez(root / "given.npz", tokens=tokens, prompt=prompt, mask=SDAR_MASK)
    run([sys.executable, "-c", _SDAR, name, root / "sdar", code, root / "given.npz", root / "sdar.npz"], old)
    theirs = np.load(root / "sdar.npz")
    result = compare(lm.logits(tokens, attention=SDAR_BLOCKS.prefill_mask()), theirs["logits"])
    for rule, settings in SDAR_RULES.items():
        text = np.zeros_like(theirs[rule])
        text[0, : len(prompt)] = prompt
        fixed, length = np.arange(text.shape[1])[None] < len(prompt), np.array([text.shape[1]])
        spec = SamplingSpec(SamplerConfig(temperature=0.0, **settings), lm.pretrained.diffusion)
        ours = sample(lm.model, text, fixed, length, example_keys(0, np.arange(1, dtype=np.uint32)), spec).tokens
        result[rule] = {"new_tokens": int((~fixed).sum()), "equal": bool((np.asarray(ours) == theirs[rule]).all())}
    result["auto_config"] = {}
    for path in dict.fromkeys((old, "")):
        printed = run([sys.executable, "-c", _CONFIG, root / "sdar", root / "modules"], *([path] if path else []))
        version, theta, scaling = json.loads(printed.rpartition("RESULT")[2])
        result["auto_config"][version] = {"rope_theta": theta, "rope_scaling": scaling}
    print(harness.table_head("export, SDAR's code", "largest logit", "largest difference",
                             *(f"text by {rule}" for rule in SDAR_RULES)))
    texts = ("equal" if result[rule]["equal"] else "different" for rule in SDAR_RULES)
    print(harness.row(name, *cells(result), *texts))
    print(f"\nAutoConfig of transformers: {result['auto_config']}")
    return result


def exported_models(tokenizer: object, root: pathlib.Path) -> dict[str, DiffusionLM]:
    """Exports models that llama.cpp knows, to the folder of each architecture's name; returns them."""
    shapes = {"vocab_size": len(tokenizer) + 1}
    experts = SIZES | EXPERTS | shapes | {"model_type": "qwen3_moe", "head_dim": 64}
    configs = {"dream": SIZES | shapes | {"model_type": "qwen2"}, "qwen3moe": experts | {"norm_topk_prob": True},
               "rnd1": experts | {"norm_topk_prob": True}, "llada-moe": experts | {"norm_topk_prob": False},
               "llada": SIZES | shapes | {"model_type": "llama"}}
    models = {}
    for name, config in configs.items():
        models[name] = DiffusionLM(random_model(root / "bases" / name, config, tokenizer))
        models[name].save_pretrained(root / name, layout="dream" if name == "dream" else "hf")
    names = {"rnd1": {"model_type": "rnd1", "architectures": ["RND1"]},
             "llada-moe": {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "qk_layernorm": True,
                           "expert_intermediate_size": EXPERTS["moe_intermediate_size"], "moe_layer_freq": [1, 1, 1]},
             "llada": {"model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": SIZES["hidden_size"],
                       "mlp_hidden_size": SIZES["intermediate_size"],
                       "max_sequence_length": SIZES["max_position_embeddings"]}}
    for name, settings in names.items():
        path = root / name / "config.json"
        config = json.loads(path.read_text())
        del config["dlm_jax"]
        mask = models[name].pretrained.diffusion.mask_token_id
        path.write_text(json.dumps(config | settings | {"mask_token_id": mask}))
    return models


def gguf_files(tokenizer: object, converter: pathlib.Path, python: str, root: pathlib.Path) -> dict[str, object]:
    results = {}
    print(harness.table_head("GGUF file", "largest logit", "difference in llama.cpp", "difference when read again",
                             "read as"))
    for name, lm in exported_models(tokenizer, root).items():
        run([sys.executable, converter, root / name, "--outtype", "f32", "--outfile", file := root / f"{name}.gguf"])
        mask, is_causal = lm.pretrained.diffusion.mask_token_id, name == "qwen3moe"
        again = DiffusionLM.from_pretrained(file, mask_token=mask if is_causal else None)
        attention = AttentionMask.causal() if is_causal else AttentionMask.bidirectional()
        tokens = masked_rows(lm.config.vocab_size, mask)
        np.save(root / "tokens.npy", tokens)
        run([python, "-c", _LLAMA_CPP, file, root / "tokens.npy", root / "logits.npy"])
        ours, diffusion = np.asarray(lm.logits(tokens, attention=attention)), again.pretrained.diffusion
        result = compare(np.load(root / "logits.npy"), ours) | {
            "read_again": float(np.abs(np.asarray(again.logits(tokens, attention=attention)) - ours).max()),
            "shift": diffusion.shift, "same_mask_token": diffusion.mask_token_id == mask}
        results[name] = result
        print(harness.row(name, *cells(result), f"{result['read_again']:.1e}",
                          "shift" if diffusion.shift else "no shift"))
    return results


def cli_text(binary: pathlib.Path, root: pathlib.Path) -> dict[str, object]:
    """Returns whether llama-diffusion-cli writes what this library's logits give, revealed from left to right."""
    lm = DiffusionLM.from_pretrained(root / "dream.gguf")
    printed = run([binary, "-m", root / "dream.gguf", "-p", PROMPT, "-c", LENGTH, "-b", LENGTH, "-ub", LENGTH,
                   "--diffusion-algorithm", 4, "--diffusion-eps", EPS, "--diffusion-steps", STEPS, "--top-k", 1,
                   "--temp", 0, "-t", 1, "--no-log-prefix", "--no-log-timestamps"])
    theirs = re.split(r"sampling time per step: [\d.]+ms\s*\n", printed)[-1]
    mask = lm.pretrained.diffusion.mask_token_id
    given = lm.pretrained.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)
    tokens = np.array(given + [mask] * (LENGTH - len(given)))
    for step in range(STEPS):
        masked = np.flatnonzero(tokens == mask)
        before, after = (np.float32(1 - at / STEPS * (1 - EPS)) for at in (step, step + 1))
        share = 1 if step == STEPS - 1 else 1 - after / before
        logits = np.asarray(lm.logits(tokens[None], attention=AttentionMask.bidirectional()))[0]
        for position in masked[: int(np.float32(len(masked)) * np.float32(share))]:
            tokens[position] = logits[position - 1].argmax()
    ours = lm.pretrained.tokenizer.decode(tokens[len(given) :], skip_special_tokens=True).replace("\ufffd", "")
    equal = ours.strip() == theirs.strip()
    print(f"\nllama-diffusion-cli: {LENGTH - len(given)} tokens {'equal' if equal else 'different'}")
    return {"new_tokens": LENGTH - len(given), "equal": equal}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--code", type=pathlib.Path, help="folder of the authors' code")
    parser.add_argument("--old", default="", help="folder of transformers 4.52")
    parser.add_argument("--new", default="", help="folder of transformers 4.57")
    parser.add_argument("--model", type=pathlib.Path, help="a model whose tokenizer has a chat template")
    parser.add_argument("--llama_cpp", metavar="PYTHON", help="an interpreter with llama-cpp-python")
    parser.add_argument("--converter", type=pathlib.Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--diffusion_cli", type=pathlib.Path, help="llama.cpp's llama-diffusion-cli")
    args = parser.parse_args()
    results = harness.read_json("engines", {})
    with tempfile.TemporaryDirectory() as folder:
        measure(args, pathlib.Path(folder), results)
    harness.write_results("engines", results, "jax", "torch", "transformers", "gguf")


def measure(args: argparse.Namespace, root: pathlib.Path, results: dict[str, object]) -> None:
    """Adds what the arguments allow to `results`."""
    if args.code:
        code = args.code.absolute()
        results["own_code"] = own_code(code, {args.old: OLD, args.new: NEW}, root / "own")
        results["sdar_export"] = {name: sdar_export(name, code, args.old, root / name) for name in ("sdar", "sdar_moe")}
    if args.llama_cpp:
        tokenizer = load_pretrained(args.model, init="abstract").tokenizer
        results["gguf"] = gguf_files(tokenizer, args.converter.absolute(), args.llama_cpp, root / "gguf")
        results["llama_cpp_python"] = run(
            [args.llama_cpp, "-c", "import llama_cpp; print(llama_cpp.__version__)"]).strip()
        if args.diffusion_cli:
            results["diffusion_cli"] = cli_text(args.diffusion_cli.absolute(), root / "gguf")


if __name__ == "__main__":
    main()
