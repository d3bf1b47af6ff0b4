"""Times speculative decoding beside plain decoding from left to right, on prompts of several kinds.

    python benchmarks/speculative.py --model=smollm2.gguf --data_dir=DIR --drafters ngram runs/drafter

DIR has the folders tinystories, wikitext2, gsm8k and humaneval_infilling. All take turns, and their texts are compared.
They are the same, but where float rounding decides between two tokens, and where drafts are sampled: then they are
other texts of the same distribution, unless the temperature is 0.

With --profile (on a CPU) it traces the first batch of each kind of prompt, and prints the milliseconds per pass by
part: `draft` (the drafter, and the choice of its guesses), `verify` (head and token choice of the model), and `rest`
(the model's pass over the guesses, and the prompt's).
"""

import argparse
import dataclasses
import gzip
import json
import pathlib
import statistics
import tempfile

import harness
import jax
import numpy as np
from flax import nnx
from step_profile import scope_seconds

from dlm_jax import DiffusionLM
from dlm_jax.matmul import compiler_options
from dlm_jax.models import DraftedModel, Transformer
from dlm_jax.random import example_keys
from dlm_jax.sampling import GAP, PaddedBatch, SamplerConfig, SamplingSpec, SamplingStats, pad_rows, sample
from dlm_jax.sampling.sampler import fill, make_stepper, resolve_spec
from dlm_jax.sampling.spec import RowSettings

_NO_HEADS = ", no heads"
PARTS = "draft", "verify", "rest"


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


def without_heads(model: Transformer | DraftedModel) -> Transformer | DraftedModel:
    """Returns a model whose drafts do not depend on each other: it makes the most likely ones."""
    model = nnx.merge(*nnx.split(model))
    if isinstance(model, DraftedModel):
        model.drafter.markov = model.drafter.selector = None
    else:
        model.draft_head = None
    return model


def compare(lm: DiffusionLM, prompts: list[str], batch_size: int, new_tokens: int, configs: dict[str, SamplerConfig],
            repeats: int, profile: bool) -> dict[str, dict]:
    """Returns what each way of decoding needs for batches of the prompts; plain decoding is the first.

    Args:
      profile: whether to measure the parts of the first batch.
    """
    ids = [lm.tokenizer(prompt, add_special_tokens=False)["input_ids"][-96:] for prompt in prompts]
    rows = [[lm.pretrained.start_token_id or row[0], *row, *[GAP] * new_tokens] for row in ids]
    models = {name: lm.model_with_drafter(config.drafter) for name, config in configs.items()}
    models |= {name: without_heads(model) for name, model in models.items() if name.endswith(_NO_HEADS)}
    seconds, stats = dict.fromkeys(configs, 0.0), {name: SamplingStats() for name in configs}
    passes, equal, milliseconds = dict.fromkeys(configs, 0), dict.fromkeys(configs, 0), {}
    for start in range(0, len(rows) - batch_size + 1, batch_size):
        batch = pad_rows(rows[start : start + batch_size], 256)
        keys = example_keys(0, np.arange(start, start + batch_size, dtype=np.uint32))
        found = {}

        def run(_: int, name: str, batch=batch, keys=keys, found=found) -> None:
            spec = SamplingSpec(configs[name], lm.pretrained.diffusion)
            model = models[name]
            found[name] = jax.block_until_ready(sample(model, batch.tokens, batch.fixed, batch.lengths, keys, spec))

        times = harness.time_in_turns({name: lambda n, name=name: run(n, name) for name in configs}, repeats,
                                      warmup=1 if start == 0 else 0)
        if profile and start == 0:
            milliseconds = {name: {"milliseconds per pass": parts(
                models[name], batch, keys, SamplingSpec(config, lm.pretrained.diffusion))} for name, config in
                configs.items()}
        plain = np.asarray(next(iter(found.values())).tokens)
        for name, result in found.items():
            seconds[name] += statistics.median(times[name])
            stats[name].add(result, batch_size, 0.0)
            passes[name] += int(np.max(result.steps))  # of the batch
            equal[name] += int(np.sum(np.all(plain == np.asarray(result.tokens), axis=1)))
    tokens, per_second = next(iter(stats.values())).tokens, {}
    for name in configs:
        per_second[name] = tokens / seconds[name]
    return {name: {"tokens per pass": stats[name].tokens_per_pass, "acceptance": stats[name].acceptance,
                   "batch passes": passes[name], "tokens per second": per_second[name],
                   "ratio": per_second[name] / next(iter(per_second.values())), "equal texts": equal[name],
                   "texts": stats[name].texts} | milliseconds.get(name, {}) for name in configs}


def parts(model: Transformer | DraftedModel, batch: PaddedBatch, keys: jax.Array, spec: SamplingSpec) -> dict:
    """Returns the milliseconds per pass of each part of the decoding of a batch."""
    spec = resolve_spec(model, spec, batch.fixed, batch.lengths)

    def decode(graphdef: object, params: object, *arrays: object) -> object:
        return fill(make_stepper(nnx.merge(graphdef, params), spec), *arrays)

    arguments = (*nnx.split(model), batch.tokens, batch.fixed, batch.lengths, keys,
                 RowSettings.of(spec.config, len(batch.tokens)))
    options = compiler_options(getattr(model, "target", model).compute.matmul)
    program = jax.jit(decode, static_argnames="graphdef", compiler_options=options).lower(*arguments).compile()
    found = jax.block_until_ready(program(*arguments[1:]))
    with tempfile.TemporaryDirectory() as folder:
        seconds = scope_seconds(lambda: jax.block_until_ready(program(*arguments[1:])), program.as_text(), folder,
                                PARTS[:-1])
    passes = int(np.max(found.steps))
    return {part: 1e3 * spent / passes for part, spent in seconds.items()}


def main() -> None:
    parser = harness.parser(__doc__, prompts=8, new_tokens=128, repeats=1)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a directory or a GGUF file")
    parser.add_argument("--data_dir", type=pathlib.Path, required=True)
    parser.add_argument("--drafters", nargs="+", default=["ngram"], help="ngram, self, or trained ones")
    parser.add_argument("--draft_threshold", type=float, help="of trained drafters with a confidence head")
    parser.add_argument("--draft_vocab_size", type=int, help="of drafters but ngram")
    parser.add_argument("--num_drafts", type=int, nargs="+", default=[None],
                        help="of drafters but ngram; of several numbers each takes its turn")
    parser.add_argument("--without_heads", action="store_true", help="drafters also without what makes their drafts "
                        "depend on each other")
    parser.add_argument("--kinds", nargs="+", default=["stories", "wikitext", "GSM8K", "HumanEval"])
    parser.add_argument("--dtype", default="float32", help="default %(default)s")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--profile", action="store_true", help="also the milliseconds of each part of a pass")
    parser.add_argument("--name", default="speculative", help="of the results file, default %(default)s")
    args: argparse.Namespace = parser.parse_args()
    lm, results = DiffusionLM.from_pretrained(args.model, dtype=args.dtype), []
    parts_head = [f"ms of {part}" for part in PARTS] if args.profile else []
    print(harness.table_head("prompts", "batch", "temperature", "drafter", "tokens per pass", "accepted by position",
                             "tokens per second", "ratio", "equal texts", *parts_head), flush=True)
    prompts = read_prompts(args.data_dir, args.prompts)
    for kind in args.kinds:
        for batch_size in args.batch_sizes:
            for temperature in args.temperatures:
                configs = {"none": SamplerConfig("autoregressive", temperature=temperature)}
                for drafter in args.drafters:
                    if drafter == "ngram":
                        configs[drafter] = dataclasses.replace(configs["none"], drafter=drafter)
                        continue
                    threshold = {} if drafter == "self" else {"draft_threshold": args.draft_threshold}
                    for number in args.num_drafts:
                        name = drafter if number is None else f"{drafter}, {number} drafts"
                        configs[name] = dataclasses.replace(
                            configs["none"], drafter=drafter, num_drafts=number,
                            draft_vocab_size=args.draft_vocab_size, **threshold)
                        if args.without_heads:
                            configs[name + _NO_HEADS] = configs[name]
                found = compare(lm, prompts[kind], batch_size, args.new_tokens, configs, args.repeats,
                                args.profile)
                for drafter, one in found.items():
                    name = pathlib.PurePath(drafter).name
                    results.append({"prompts": kind, "batch": batch_size, "temperature": temperature, "drafter": name,
                                    **one})
                    accepted = " ".join(f"{share:.2f}" for share in one["acceptance"])
                    print(harness.row(kind, batch_size, temperature, name, f"{one['tokens per pass']:.2f}", accepted,
                                      f"{one['tokens per second']:.1f}", f"{one['ratio']:.2f}",
                                      f"{one['equal texts']} of {one['texts']}",
                                      *(f"{one['milliseconds per pass'][part]:.1f}" for part in PARTS
                                        if args.profile)), flush=True)
    harness.write_results(f"{args.name}-{harness.device_name()}", {
        "settings": harness.settings(args, "model", "data_dir", "drafters", "name"), "model": args.model.name,
        "results": results}, "jax")


if __name__ == "__main__":
    main()
