"""Times speculative decoding beside plain decoding from left to right, on prompts of several kinds.

    python benchmarks/speculative.py --model=smollm2.gguf --data_dir=DIR

DIR has the folders tinystories, wikitext2, gsm8k and humaneval_infilling. The two take turns, and their texts are
compared: they are the same, but where float rounding decides between two tokens.
"""

import argparse
import gzip
import json
import pathlib
import statistics

import harness
import jax
import numpy as np

from dlm_jax import DiffusionLM
from dlm_jax.random import example_keys
from dlm_jax.sampling import GAP, SamplerConfig, SamplingSpec, pad_rows, sample


def read_prompts(data_dir: pathlib.Path, number: int) -> dict[str, list[str]]:
    """Returns prompts of each kind: starts of texts, questions, and programs up to the middle."""
    stories = json.loads((data_dir / "tinystories" / "stories_900.json").read_text())
    articles = [line for line in (data_dir / "wikitext2" / "valid.txt").read_text().splitlines() if len(line) > 400]
    questions = map(json.loads, (data_dir / "gsm8k" / "test.jsonl").read_text().splitlines())
    with gzip.open(data_dir / "humaneval_infilling" / "HumanEval-SingleLineInfilling.jsonl.gz", "rt") as file:
        records = {record["task_id"].split("/")[2]: record for record in map(json.loads, file)}
    prompts = {"stories": [story[:120] for story in stories], "wikitext": [text[:200] for text in articles],
               "GSM8K": [f"Question: {record['question']}\nAnswer:" for record in questions],
               "HumanEval": [record["prompt"] for record in records.values()]}
    return {kind: found[:number] for kind, found in prompts.items()}


def compare(lm: DiffusionLM, prompts: list[str], batch_size: int, new_tokens: int, configs: dict[str, SamplerConfig],
            repeats: int) -> dict[str, float]:
    """Returns tokens a pass, and tokens per second of both, over batches of the prompts."""
    ids = [lm.tokenizer(prompt, add_special_tokens=False)["input_ids"][-96:] for prompt in prompts]
    rows = [[lm.pretrained.start_token_id or row[0], *row, *[GAP] * new_tokens] for row in ids]
    seconds = dict.fromkeys(configs, 0.0)
    passes, new, equal = 0, 0, 0
    for start in range(0, len(rows) - batch_size + 1, batch_size):
        batch = pad_rows(rows[start : start + batch_size], 256)
        keys = example_keys(0, np.arange(start, start + batch_size, dtype=np.uint32))
        found = {}

        def run(_: int, name: str, batch=batch, keys=keys, found=found) -> None:
            spec = SamplingSpec(configs[name], lm.pretrained.diffusion)
            found[name] = jax.block_until_ready(sample(lm.model, batch.tokens, batch.fixed, batch.lengths, keys, spec))

        times = harness.time_in_turns({name: lambda n, name=name: run(n, name) for name in configs}, repeats,
                                      warmup=1 if start == 0 else 0)
        for name in configs:
            seconds[name] += statistics.median(times[name])
        plain, drafted = found.values()
        passes += int(np.max(drafted.steps))
        new += new_tokens
        equal += int(np.sum(np.all(np.asarray(plain.tokens) == np.asarray(drafted.tokens), axis=1)))
    plain, drafted = (new * batch_size / value for value in seconds.values())
    return {"tokens per pass": new / passes, "equal texts": equal, "texts": len(rows) // batch_size * batch_size,
            "tokens per second": drafted, "plain": plain, "ratio": drafted / plain}


def main() -> None:
    parser = harness.parser(__doc__, prompts=8, new_tokens=128, num_drafts=8, repeats=1)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a directory or a GGUF file")
    parser.add_argument("--data_dir", type=pathlib.Path, required=True)
    parser.add_argument("--dtype", default="float32", help="default %(default)s")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    args: argparse.Namespace = parser.parse_args()
    lm, results = DiffusionLM.from_pretrained(args.model, dtype=args.dtype), []
    print(harness.table_head("prompts", "batch", "temperature", "tokens per pass", "tokens per second", "plain",
                             "ratio", "equal texts"), flush=True)
    for kind, prompts in read_prompts(args.data_dir, args.prompts).items():
        for batch_size in args.batch_sizes:
            for temperature in args.temperatures:
                plain = SamplerConfig("autoregressive", temperature=temperature)
                drafted = SamplerConfig("autoregressive", temperature=temperature, drafter="ngram",
                                        num_drafts=args.num_drafts)
                found = compare(lm, prompts, batch_size, args.new_tokens, {"plain": plain, "drafted": drafted},
                                args.repeats)
                results.append({"prompts": kind, "batch": batch_size, "temperature": temperature, **found})
                print(harness.row(kind, batch_size, temperature, f"{found['tokens per pass']:.2f}",
                                  f"{found['tokens per second']:.1f}", f"{found['plain']:.1f}",
                                  f"{found['ratio']:.2f}", f"{found['equal texts']} of {found['texts']}"), flush=True)
    harness.write_results(f"speculative-{harness.device_name()}", {
        "settings": harness.settings(args, "model", "data_dir"), "model": args.model.name, "results": results}, "jax")


if __name__ == "__main__":
    main()
