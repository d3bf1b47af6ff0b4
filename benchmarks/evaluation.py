"""Multiple choice: speed compared with a PyTorch loop like the DiffuLLaMA reference, and the error of a score.

    python benchmarks/evaluation.py speed                                       GPT-2 small with random weights: a CPU
    python benchmarks/evaluation.py speed --model=assets/stories-gpt2 --items=16         a model in HF layout
    python benchmarks/evaluation.py error --model=WORKDIR --data=hellaswag.jsonl            needs an adapted model

`speed`: the same weights, items and noise on both sides, 32 forward passes an option. PyTorch takes them one by one
and computes full logits, as the reference does; ours takes them in batches and computes logits where a token is masked.
Both give the same scores, which is checked. The sides take turns; the first run of each does not count.

`error`: scores of real items under different noise. What decides an item is the difference between two options, so its
error is what counts, in units of how far such differences spread over items, which makes rules with different
expectations comparable; `bound, reference's draws` has the same expectation as ours (but for its grid of 32 times).
Writes benchmarks/results/evaluation-{speed-MODEL,error}.json.
"""

import argparse
import pathlib
import statistics
import tempfile
from collections.abc import Callable

import harness
import numpy as np
from harness import MASK_TOKEN_ID

from dlm_jax.evaluation.eval_model import Pair
from dlm_jax.evaluation.scoring import MaskSample, bound_masks, reference_masks

NUM_PASSES = 32


def noise_of(pair: Pair, seed: int) -> np.ndarray:
    """Returns noise, sampled anew for every option, as in the reference."""
    return np.random.default_rng([seed, pair.item, pair.option]).random((NUM_PASSES, len(pair.continuation)))


def reference_bound_masks(uniform: np.ndarray) -> list[MaskSample]:
    """The bound from the reference's draws: iid masks at rates t / T, each pass with weight 1 / rate."""
    rates = (NUM_PASSES - np.arange(NUM_PASSES)) / NUM_PASSES
    masked = uniform < rates[:, None]
    some = masked.any(axis=1)
    return [MaskSample(masked[some], 1 / (NUM_PASSES * rates[some]))]


def speed(args: argparse.Namespace) -> dict:
    """Items a second of both sides."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from dlm_jax.checkpoints import load_pretrained
    from dlm_jax.diffusion import DiffusionSpec
    from dlm_jax.evaluation.scoring import diffusion_score

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        source = args.model or folder
        if not args.model:
            GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        ours = load_pretrained(source, mask_token=MASK_TOKEN_ID).model
    rng, vocab_size = np.random.default_rng(0), ours.config.vocab_size
    pairs = []
    for item in range(args.items):  # as long as HellaSwag's
        context = tuple(map(int, rng.integers(0, vocab_size, rng.integers(30, 70))))
        pairs += [Pair(context, tuple(map(int, rng.integers(0, vocab_size, rng.integers(12, 36)))), item, option)
                  for option in range(4)]

    @torch.no_grad()
    def pytorch() -> np.ndarray:
        scores = []
        for pair in pairs:
            row = torch.tensor([*pair.context, *pair.continuation])[None]
            uniform, total = torch.tensor(noise_of(pair, 0)), 0.0
            bias = torch.zeros(1, 1, row.shape[1], row.shape[1])
            for t in range(NUM_PASSES, 0, -1):
                masked = torch.zeros(row.shape, dtype=torch.bool)
                masked[0, len(pair.context) :] = uniform[NUM_PASSES - t] < t / NUM_PASSES
                logits = model(torch.where(masked, MASK_TOKEN_ID, row), attention_mask=bias, use_cache=False).logits
                nll = torch.nn.functional.cross_entropy(logits[0, :-1].float(), row[0, 1:], reduction="none")
                if masked.any():
                    total += float(nll[masked[0, 1:]].mean())
            scores.append(total / NUM_PASSES)
        return np.array(scores)

    score = diffusion_score(ours, lambda pair: reference_masks(noise_of(pair, 0)),
                            diffusion=DiffusionSpec(MASK_TOKEN_ID), batch_size=args.batch_size)
    sides: dict[str, Callable[[], np.ndarray]] = {"ours": lambda: score(pairs).mean(axis=1), "pytorch": pytorch}
    found: dict[str, np.ndarray] = {}

    def run(name: str) -> None:
        found[name] = sides[name]()

    seconds = harness.time_in_turns({name: lambda _, name=name: run(name) for name in sides}, args.repeats)
    np.testing.assert_allclose(found["ours"], found["pytorch"], rtol=2e-4)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    passes = sum(len(half.masked) for pair in pairs for half in reference_masks(noise_of(pair, 0)))
    result = {"seconds": seconds, "items_per_second": {name: args.items / value for name, value in median.items()},
              "ratio": median["pytorch"] / median["ours"],
              "passes": {"pytorch": NUM_PASSES * len(pairs), "ours": passes}}
    print("| side | items a second | passes |\n| --- | --- | --- |")
    for name in sides:
        print(f"| {name} | {result['items_per_second'][name]:.3f} | {result['passes'][name]} |")
    print(f"ours is {result['ratio']:.2f} times as fast")
    return result


def error(args: argparse.Namespace) -> dict:
    """The variance of differences between options, per forward pass."""
    from dlm_jax import DiffusionLM
    from dlm_jax.evaluation.eval_model import make_pair
    from dlm_jax.evaluation.make_eval_model import make_eval_model
    from dlm_jax.evaluation.scoring import diffusion_score
    from dlm_jax.evaluation.task_loading import load_tasks

    lm = DiffusionLM.from_pretrained(args.model)
    eval_model = make_eval_model(lm.pretrained, "model")
    task = load_tasks([args.task], data_files={args.task: args.data}, num_fewshot=0).tasks[args.task]
    docs = [task.eval_docs[number] for number in range(args.items)]
    pairs = [make_pair(eval_model, task.doc_to_text(doc), f" {choice}", number, option, args.task)
             for number, doc in enumerate(docs) for option, choice in enumerate(task.doc_to_choice(doc))]
    lengths = np.array([len(pair.continuation) for pair in pairs])
    rules: dict[str, tuple[int, Callable[[int], Callable[[Pair], list[MaskSample]]], np.ndarray]] = {
        "reference": (NUM_PASSES, lambda seed: lambda pair: reference_masks(noise_of(pair, seed)), np.ones(len(pairs))),
        "bound, reference's draws": (NUM_PASSES, lambda seed: lambda pair: reference_bound_masks(noise_of(pair, seed)),
                                   1 / lengths)}
    for count in (8, 16, 32):
        rules[f"ours, {count}"] = (count, lambda seed, count=count: lambda pair: bound_masks(
            len(pair.continuation), count, seed, pair.item), 1 / lengths)
    first = np.array([place for place, pair in enumerate(pairs) if pair.option])  # each option against option 0
    zero = np.array([place - pairs[place].option for place in first])
    print("| rule | passes an option | error of a difference, nats a token | relative to the spread | "
          "passes for the reference's relative error |\n| --- | --- | --- | --- | --- |")
    result: dict[str, dict[str, float]] = {}
    for name, (count, rule, scale) in rules.items():
        found = np.stack([diffusion_score(
            lm.model, rule(seed), diffusion=lm.diffusion,
            bos_token_id=lm.pretrained.bos_token_id, batch_size=args.batch_size)(pairs).mean(axis=1) * scale
            for seed in range(args.repeats)])  # nats a token, [repeats, pairs]
        gaps = found[:, first] - found[:, zero]
        noise = gaps.var(axis=0, ddof=1).mean()
        spread = gaps.mean(axis=0).var() - noise / args.repeats
        result[name] = {"num_samples": count, "error_nats_per_token": noise**0.5, "spread": spread**0.5,
                        "passes": float(np.mean([sum(len(half.masked) for half in rule(0)(pair)) for pair in pairs])),
                        "relative_variance": noise / spread}
        row = result[name]
        row["passes_for_equal_error"] = (row["passes"] * row["relative_variance"]
                                         / result["reference"]["relative_variance"])
        print(f"| {name} | {row['passes']:.1f} | {row['error_nats_per_token']:.4f} | "
              f"{row['relative_variance'] ** 0.5:.3f} | {row['passes_for_equal_error']:.1f} |", flush=True)
    return result


def main() -> None:
    parser = harness.parser(__doc__, batch_size=32, threads=2)
    parser.add_argument("part", choices=("speed", "error"))
    parser.add_argument("--items", type=int, help="default 3 for speed, 16 for error")
    parser.add_argument("--repeats", type=int, help="default 2 for speed, 10 for error")
    parser.add_argument("--model", help="for error: a diffusion model; for speed: in HF layout (default: GPT-2 small)")
    parser.add_argument("--data", help="for error: the task's file")
    parser.add_argument("--task", default="hellaswag")
    args = parser.parse_args()
    if args.part == "error" and not (args.model and args.data):
        parser.error("error needs --model and --data")
    args.items = args.items or {"speed": 3, "error": 16}[args.part]
    args.repeats = args.repeats or {"speed": 2, "error": 10}[args.part]

    result = (speed if args.part == "speed" else error)(args)
    name = f"{args.part}-{pathlib.Path(args.model or 'gpt2-small').name}" if args.part == "speed" else args.part
    content = {"settings": harness.settings(args, "model", "data"), "results": result}
    harness.write_results(f"evaluation-{name}", content, "jax", "flax", "torch", "transformers")


if __name__ == "__main__":
    main()
