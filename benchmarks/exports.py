"""Whether exported directories load in other versions of transformers, with the same logits and token ids.

    pip install --target=DIR --no-deps transformers==4.57.3 tokenizers==0.22.1 huggingface_hub==0.36.0
    python benchmarks/exports.py --other=DIR [--models DIRECTORY_OR_GGUF ...]

Small models of each architecture with random weights, and `--models`, are exported; then a process with the installed
transformers and one with that of `--other` load each directory by AutoModelForCausalLM and AutoTokenizer. The table has
the largest difference of logits, causal as transformers computes them, in float32, and how many of the difficult texts
that tokenizers are tested with get the same ids. Writes benchmarks/results/exports.json.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import harness
import numpy as np

_LLAMA = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 96, "max_position_embeddings": 64, "vocab_size": 97, "initializer_range": 0.2}
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 97,
             "initializer_range": 0.2},
    "llama": {"model_type": "llama", **_LLAMA},
    "llama, tied": {"model_type": "llama", **_LLAMA, "tie_word_embeddings": True},
    "llama 3's RoPE": {"model_type": "llama", **_LLAMA, "rope_theta": 500000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "llama, linear RoPE": {"model_type": "llama", **_LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral, window": {"model_type": "mistral", **_LLAMA, "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", **_LLAMA},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 24, "tie_word_embeddings": True},
}

_LOAD = """
import json, sys, numpy, torch, transformers
transformers.logging.set_verbosity_error()
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {"version": transformers.__version__}
for folder in sys.argv[1:]:
    expected = numpy.load(folder + "/expected.npz")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval().float()(torch.from_numpy(expected["tokens"])).logits.numpy()
    found[folder] = {"difference": float(abs(logits - expected["logits"]).max()), "loading": str(
        {name: str(value) for name, value in info.items() if value})}
    if "texts" in expected:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts, rows = json.loads(str(expected["texts"]))
        ids = [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
        found[folder]["ids"] = [sum(a == b for a, b in zip(ids, rows)), len(texts)]
print("RESULT" + json.dumps(found))
"""


def export(source: str, mask_token: object, folder: pathlib.Path, *, init: str) -> float:
    """Exports a model with what it should compute beside it; returns its largest logit."""
    from dlm_jax import AttentionMask, DiffusionLM
    from dlm_jax.checkpoints import load_pretrained
    from dlm_jax.data.tokenization import PROBE, tokenize

    lm = DiffusionLM(load_pretrained(source, default_mask_token=mask_token, init=init))
    lm.save_pretrained(folder)
    tokens = np.random.default_rng(0).integers(0, lm.config.vocab_size, (2, 24))
    logits = np.asarray(lm.logits(tokens, attention=AttentionMask.causal()))
    tokenizer = lm.pretrained.tokenizer
    texts = {} if tokenizer is None else {"texts": json.dumps([PROBE, tokenize(tokenizer, PROBE)])}
    np.savez(folder / "expected.npz", tokens=tokens, logits=logits, **texts)
    return float(np.abs(logits).max())


def load(folders: list[str], path: str) -> dict[str, dict[str, object]]:
    """Returns what transformers makes of the folders; `path` precedes the installed packages."""
    environment = os.environ | {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}
    result = subprocess.run([sys.executable, "-c", _LOAD, *folders], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return json.loads(result.stdout.rpartition("RESULT")[2])


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--models", nargs="*", default=[str(harness.ROOT / "assets" / "stories-gpt2")])
    parser.add_argument("--other", default="", help="folder of another version of transformers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        root, largest = pathlib.Path(root), {}
        for name, config in CONFIGS.items():
            (base := root / "bases" / name).mkdir(parents=True)
            (base / "config.json").write_text(json.dumps(config))
            largest[name] = export(str(base), 5, root / name, init="random")
        for source in args.models:
            name = pathlib.Path(source).name
            largest[name] = export(source, "<|mask|>", root / name, init="pretrained")
        folders = [str(root / name) for name in largest]
        loaded = [load(folders, path) for path in dict.fromkeys(("", args.other))]
        results, versions = [], [found["version"] for found in loaded]
        print(harness.table_head("model", "largest logit", *(f"difference in {version}, equal ids"
                                                             for version in versions)))
        for name in largest:
            found = [versioned[str(root / name)] for versioned in loaded]
            results.append({"model": name, "largest_logit": largest[name]} | dict(zip(versions, found, strict=True)))
            print(harness.row(name, f"{largest[name]:.1f}", *(
                f"{one['difference']:.1e}" + (f", {one['ids'][0]} of {one['ids'][1]}" if "ids" in one else "")
                for one in found)))
    harness.write_results("exports", {"results": results}, "transformers", "torch")


if __name__ == "__main__":
    main()
