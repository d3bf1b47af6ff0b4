"""Compares a pretrained model with PyTorch's: logits, greedy text, and every item of tasks.

    python benchmarks/torch_parity.py --model=smollm2.gguf --data_dir=DIR

DIR holds a folder per task, as for `dlm evaluate`. PyTorch reads the model by itself (transformers). Tasks are
lm-eval's, by our adapter and by lm-eval's own backend `hf`, on the same items, in float32 and from left to right; both
put the same token at position 0. Seconds are those of whole tasks, with compilation.
"""

import argparse
import copy
import pathlib
import time
from collections.abc import Sequence

import harness
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from dlm_jax import AttentionMask, DiffusionLM
from dlm_jax.evaluation.lm_eval import LmEvalAdapter
from dlm_jax.evaluation.make_eval_model import make_eval_model
from dlm_jax.evaluation.run import quiet
from dlm_jax.evaluation.task_loading import load_tasks

TASKS = ("hellaswag", "piqa", "winogrande", "social_iqa", "lambada_openai", "gsm8k")
METRICS = ("acc", "exact_match")
PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):\n", "Q: What is 17 + 25?\nA:",
           "In 1905, Albert Einstein")
NEW_TOKENS = 32


def load_torch(path: pathlib.Path) -> torch.nn.Module:
    """Returns the model of a directory or a GGUF file as transformers reads it, in float32."""
    where = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()


class Peer(HFLM):
    """lm-eval's own backend, whose rows begin with the token that ours begin with."""

    start: int | None = None

    def tok_encode(self, string: str | list[str], *args: object, **settings: object) -> list:
        found = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        head = [] if self.start is None else [self.start]
        return head + found if isinstance(string, str) else [head + row for row in found]

    def tok_batch_encode(self, strings: list[str], left_truncate_len: int | None = None,
                         **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.tok_encode(strings)
        width = max(map(len, rows))
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids, mask


def compare_logits(lm: DiffusionLM, model: torch.nn.Module, texts: Sequence[str]) -> dict[str, float]:
    """Returns the largest differences of logits: from PyTorch's, and of both from PyTorch's in float64."""
    start = lm.pretrained.start_token_id
    rows = [np.array([[start, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]]) for text in texts]

    def logits_of(model: torch.nn.Module) -> list[np.ndarray]:
        with torch.inference_mode():
            return [model(torch.tensor(row)).logits.numpy() for row in rows]

    def difference(some: list[np.ndarray], others: list[np.ndarray]) -> float:
        return float(max(np.abs(one - other).max() for one, other in zip(some, others, strict=True)))

    ours = [np.asarray(lm.logits(row, AttentionMask.causal())) for row in rows]
    theirs, exact = logits_of(model), logits_of(copy.deepcopy(model).double())
    return {"texts": len(texts), "largest difference": difference(ours, theirs),
            "from float64": difference(ours, exact), "PyTorch from float64": difference(theirs, exact),
            "largest logit": float(max(np.abs(logits).max() for logits in exact))}


def compare_greedy(lm: DiffusionLM, model: torch.nn.Module) -> dict[str, object]:
    """Returns on how many prompts greedy decoding gives the same text, and the texts."""
    ours = lm.generate(PROMPTS, NEW_TOKENS, policy="autoregressive", temperature=0.0)
    theirs, start = [], lm.pretrained.start_token_id
    for prompt in PROMPTS:
        ids = lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        head = [] if start is None else [start]
        row = model.generate(torch.tensor([head + ids]), max_new_tokens=NEW_TOKENS, do_sample=False, top_k=None,
                             eos_token_id=lm.pretrained.eos_token_id, pad_token_id=lm.pretrained.eos_token_id)[0]
        theirs.append(prompt + lm.tokenizer.decode(row[len(head + ids):], skip_special_tokens=True))
    equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
    return {"prompts": len(PROMPTS), "new tokens": NEW_TOKENS, "equal": equal, "ours": list(ours), "theirs": theirs}


def compare_task(name: str, ours: dict, theirs: dict) -> dict[str, object]:
    """Returns the metrics of both, on how many items they agree, and how the scores of options differ.

    Args:
      ours, theirs: {"samples", "results", "seconds"} of the task.
    """
    first = ours["samples"][0]["filter"]
    pairs = [pair for pair in zip(ours["samples"], theirs["samples"], strict=True) if pair[0]["filter"] == first]
    assert all(one["arguments"] == other["arguments"] for one, other in pairs)
    metric = next(metric for metric in METRICS if metric in pairs[0][0])
    gaps = [abs(a[0] - b[0]) for one, other in pairs for a, b in zip(
        one["filtered_resps"], other["filtered_resps"], strict=True) if isinstance(a, (tuple, list))]
    texts = [one["resps"] == other["resps"] for one, other in pairs] if not gaps else []
    return {"task": name, "items": len(pairs), "metric": metric,
            "dlm_jax": float(sum(one[metric] for one, _ in pairs) / len(pairs)),
            "lm-eval's hf": float(sum(other[metric] for _, other in pairs) / len(pairs)),
            "same": int(sum(one[metric] == other[metric] for one, other in pairs)),
            "largest difference, nats": max(gaps, default=None), "same text": sum(texts) if texts else None,
            "seconds": ours["seconds"], "seconds of hf": theirs["seconds"],
            "ratio": theirs["seconds"] / ours["seconds"]}


def run_task(lm: LM, name: str, args: argparse.Namespace) -> dict:
    """Evaluates a model on a task by lm-eval; returns its samples, results and seconds."""
    tasks = load_tasks([name], data_dir=args.data_dir, num_fewshot=0)
    settings = tasks.tasks[name].config.generation_kwargs
    if settings is not None:
        settings["max_gen_toks"] = args.max_gen_toks
    started = time.perf_counter()
    with quiet():
        found = lm_eval_evaluate(lm=lm, task_dict=tasks.loaded, limit=args.limit, bootstrap_iters=0, log_samples=True)
    return {"samples": found["samples"][name], "results": found["results"][name],
            "seconds": time.perf_counter() - started}


def main() -> None:
    parser = harness.parser(__doc__, limit=100, max_gen_toks=64, batch_size=16)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a directory or a GGUF file")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--name", default="torch_parity", help="of the results file")
    args: argparse.Namespace = parser.parse_args()
    lm, model = DiffusionLM.from_pretrained(args.model), load_torch(args.model)
    ours = LmEvalAdapter(make_eval_model(lm.pretrained, "dlm_jax", autoregressive=True, batch_size=args.batch_size))
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    theirs = Peer(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)
    theirs.start = lm.pretrained.start_token_id
    tasks, texts = [], []
    for name in args.tasks:
        run_task(ours, name, argparse.Namespace(**vars(args) | {"limit": 2}))  # compilation of some widths
        both = [run_task(one, name, args) for one in (ours, theirs)]
        texts += [sample["arguments"][0][0] for sample in both[0]["samples"][:4]]
        tasks.append(compare_task(name, *both))
        print(tasks[-1], flush=True)
    texts.append("\n".join(texts))  # longer than a sliding window
    logits, greedy = compare_logits(lm, model, texts), compare_greedy(lm, model)
    print(f"logits: they differ by at most {logits['largest difference']:.1e}, from PyTorch in float64 by "
          f"{logits['from float64']:.1e} and {logits['PyTorch from float64']:.1e} (the largest is "
          f"{logits['largest logit']:.1f}), on {logits['texts']} texts\n"
          f"greedy text: equal for {greedy['equal']} of {greedy['prompts']} prompts, {NEW_TOKENS} tokens each\n")
    print(harness.table_head(*tasks[0]))
    for task in tasks:
        print(harness.row(*(f"{value:.3g}" if isinstance(value, float) else value for value in task.values())))
    harness.write_results(args.name, {"settings": harness.settings(args, "model", "data_dir"), "model": args.model.name,
                                      "logits": logits, "greedy": greedy, "tasks": tasks},
                          "jax", "torch", "transformers")


if __name__ == "__main__":
    main()
