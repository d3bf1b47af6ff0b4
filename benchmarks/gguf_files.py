"""Reads a GGUF file: seconds, memory, and the tokens of texts beside llama.cpp's and those of transformers' conversion.

    python benchmarks/gguf_files.py --model=smollm2.gguf --texts gsm8k/train.jsonl --llama_cpp=PYTHON

PYTHON is an interpreter that has llama-cpp-python. The texts are lines of .txt files and strings in .json and .jsonl
files (also .gz), at most --per_file of each, and --mixed random mixtures of letters, digits, spaces, emoji and other
scripts. Texts with what looks like a special token are left out. Logits and greedy text: benchmarks/torch_parity.py.
Prints a table, and writes benchmarks/results/gguf-NAME.json.
"""

import gzip
import json
import pathlib
import random
import resource
import subprocess
import time
from collections.abc import Iterator, Sequence

import harness
import jax
from flax import nnx
from transformers import AutoTokenizer

from dlm_jax.checkpoints import load_pretrained
from dlm_jax.checkpoints.gguf_file import read_gguf
from dlm_jax.data.tokenization import PROBE, tokenize

ALPHABET = (" \n\t  0123456789abcXYZ'\".,:;!?()[]{}#*_-+=/\\|<>~"
            "\u00e9\u00bd\u4f60\u4e16\u30a2\uac00\U0001f642\U0001f469\u200d\u00a0\u200b")
LONGEST = 4000  # characters of a text
TOKENIZE = ("import json, sys, llama_cpp\n"
            "model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)\n"
            "texts = json.load(sys.stdin)\n"
            "print(json.dumps([model.tokenize(t.encode(), add_bos=False, special=False) for t in texts]))")


def read_texts(path: pathlib.Path) -> Iterator[str]:
    """Yields the lines of a text file, or every string in a JSON file."""
    content = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind == ".txt":
        yield from content.split("\n")
        return
    records = map(json.loads, content.splitlines()) if kind == ".jsonl" else json.loads(content)
    for record in records:
        values = record.values() if isinstance(record, dict) else [record]
        yield from (value for value in values if isinstance(value, str))


def collect(paths: Sequence[pathlib.Path], per_file: int, mixed: int) -> list[str]:
    """Returns the texts to compare."""
    texts = [*PROBE, *(" " * n + "x" + " " * n + "12" for n in range(40))]
    for path in paths:
        texts += [text for text, _ in zip((t for t in read_texts(path) if t), range(per_file), strict=False)]
    rng = random.Random(0)
    texts += ["".join(rng.choices(ALPHABET, k=rng.randint(1, 60))) for _ in range(mixed)]
    return [text[:LONGEST] for text in texts if text and "<|" not in text and "<s>" not in text]


def llama_cpp_ids(python: str, model: pathlib.Path, texts: Sequence[str]) -> list[list[int]]:
    done = subprocess.run([python, "-c", TOKENIZE, str(model)], input=json.dumps(texts), capture_output=True, text=True,
                          check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = harness.parser(__doc__, per_file=500, mixed=500)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--texts", type=pathlib.Path, nargs="*", default=[])
    parser.add_argument("--llama_cpp", metavar="PYTHON", help="an interpreter with llama-cpp-python")
    args = parser.parse_args()

    started = time.perf_counter()
    content = read_gguf(args.model)
    header = time.perf_counter() - started
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    loaded = load_pretrained(args.model)
    jax.block_until_ready(params := jax.tree.leaves(nnx.state(loaded.model)))
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    size = sum(leaf.nbytes for leaf in params) / 2**30
    largest = 4 * max(leaf.size for leaf in params) / 2**30

    texts = collect(args.texts, args.per_file, args.mixed)
    ours = tokenize(loaded.tokenizer, texts)
    peers = {}
    if args.llama_cpp:
        peers["llama.cpp"] = llama_cpp_ids(args.llama_cpp, args.model, texts)
    theirs = AutoTokenizer.from_pretrained(args.model.parent, gguf_file=args.model.name)
    peers["transformers' conversion"] = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    differ = {name: sum(a != b for a, b in zip(ours, ids, strict=True)) for name, ids in peers.items()}
    decoded = sum(loaded.tokenizer.decode(row) != text for row, text in zip(ours, texts, strict=True))
    result = {
        "tensors": len(content.tensors), "types": sorted({t.kind.name for t in content.tensors.values()}),
        "header_seconds": header, "load_seconds": seconds, "parameters_gib": size, "largest_parameter_gib": largest,
        "peak_gib": peak, "texts": len(texts), "tokens": sum(map(len, ours)), "texts_that_differ": differ,
        "texts_not_restored": decoded,
    }  # fmt: skip
    rows = {"header": f"{header:.2f} s", "model": f"{seconds:.1f} s",
            "parameters": f"{size:.2f} GiB, the largest {largest:.2f}", "peak while loading": f"{peak:.2f} GiB",
            "texts": f"{len(texts):,} of {result['tokens']:,} tokens",
            **{f"other tokens than {name}": f"{number} texts" for name, number in differ.items()},
            "text that decoding does not restore": f"{decoded} texts"}
    print(harness.table_head("", args.model.name))
    for name, value in rows.items():
        print(harness.row(name, value))
    harness.write_results(f"gguf-{args.model.stem}", result | {"settings": harness.settings(
        args, "llama_cpp", "texts", "model")}, "jax", "gguf", "tokenizers", "transformers")


if __name__ == "__main__":
    main()
