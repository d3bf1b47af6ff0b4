"""Has the shipped base model write the text that the quickstart adapts it on.

    python assets/write_stories.py --model=assets/stories-gpt2 --out=assets/stories-text

samples whole stories (from end-of-text to end-of-text) with torch's `generate`, which keeps a key/value cache, and
writes OUT/train.jsonl and OUT/heldout.jsonl. Needs torch, which the library itself does not.
"""

import argparse
import json
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPERATURE, TOP_P = 0.8, 0.95
HELDOUT_BYTES = 60_000


def stories(directory: pathlib.Path, seed: int, batch_size: int):
    """Endless distinct stories, each finished by the model itself within its 256 positions."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    start = torch.full((batch_size, 1), tokenizer.bos_token_id)
    seen = set()
    while True:
        rows = model.generate(start, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, max_length=256,
                              attention_mask=torch.ones_like(start), pad_token_id=tokenizer.eos_token_id)
        for row in rows[:, 1:].tolist():
            if tokenizer.eos_token_id not in row:
                continue  # cut off
            text = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]).strip()
            if len(text) >= 200 and text not in seen:
                seen.add(text)
                yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_bytes", type=int, default=900_000)
    parser.add_argument("--batch_size", type=int, default=64)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = stories(arguments.model, arguments.seed, arguments.batch_size)
    for name, budget in (("heldout", HELDOUT_BYTES), ("train", arguments.train_bytes)):
        lines, size = [], 0
        while size < budget:
            lines.append(json.dumps({"text": next(written)}) + "\n")
            size += len(lines[-1])
        (arguments.out / f"{name}.jsonl").write_text("".join(lines))
        print(f"{name}: {len(lines)} stories, {size} bytes")


if __name__ == "__main__":
    main()
