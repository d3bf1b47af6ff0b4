"""Compares a pretrained model with PyTorch's: logits, greedy text, and every item of tasks.

    python benchmarks/torch_parity.py --model=smollm2.gguf --data_dir=DIR

DIR holds a folder per task, as for `dlm evaluate`. PyTorch reads the model by itself (transformers); both score the
same token ids, in float32 and from left to right.
"""

import argparse
import pathlib
from collections.abc import Sequence

import harness
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dlm_jax import AttentionMask, DiffusionLM
from dlm_jax.evaluation.eval_model import EvalModel, Pair, make_pair
from dlm_jax.evaluation.items import Item
from dlm_jax.evaluation.make_eval_model import make_eval_model
from dlm_jax.evaluation.run import pairs_of
from dlm_jax.evaluation.tasks import Task, find_file, find_task, load_items

TASKS = ("hellaswag", "piqa", "winogrande", "siqa", "lambada")
PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):\n", "Q: What is 17 + 25?\nA:",
           "In 1905, Albert Einstein")
NEW_TOKENS = 32


def load_torch(path: pathlib.Path) -> torch.nn.Module:
    """Returns the model of a directory or a GGUF file as transformers reads it, in float32."""
    where = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()


def torch_score(model: torch.nn.Module, start: int | None, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Returns -log p(continuation | context) of each pair, in nats, and whether greedy decoding gives it."""
    scores, greedy = [], []
    for pair in pairs:
        head = () if start is None or not pair.add_bos else (start,)
        row = torch.tensor([*head, *pair.context, *pair.continuation])
        with torch.inference_mode():
            logits = model(row[None]).logits[0, -len(pair.continuation) - 1 : -1]
        targets = row[-len(pair.continuation):]
        scores.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item())
        greedy.append(torch.equal(logits.argmax(-1), targets))
    return np.array(scores), np.array(greedy)


def compare_logits(lm: DiffusionLM, model: torch.nn.Module, texts: Sequence[str]) -> dict[str, float]:
    """Returns the largest difference of two logits, and the largest logit, over the texts."""
    difference = largest = 0.0
    for text in texts:
        ids = np.array([lm.tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            theirs = model(torch.tensor(ids)).logits.numpy()
        difference = max(difference, np.abs(np.asarray(lm.logits(ids, AttentionMask.causal())) - theirs).max())
        largest = max(largest, np.abs(theirs).max())
    return {"texts": len(texts), "largest difference": float(difference), "largest logit": float(largest)}


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


def compare_task(task: Task, items: Sequence[Item], eval_model: EvalModel, model: torch.nn.Module,
                 start: int | None) -> dict[str, object]:
    """Returns the accuracies of both models, on how many items they choose the same, and how their scores differ.

    The choice is the option with the best score per byte; of LAMBADA it is whether greedy decoding gives the word.
    """
    choice = task.kind == "choice"
    rows = [pairs_of(eval_model, task, item, number) if choice else
            [make_pair(eval_model, item.prompt, item.solution, number, 0, task.name)]
            for number, item in enumerate(items)]
    flat = [pair for row in rows for pair in row]
    ours, (theirs, greedy) = np.array(eval_model.score(flat)), torch_score(model, start, flat)
    if choice:
        ends = np.cumsum([len(row) for row in rows])[:-1]
        sizes = np.array([len(text.encode()) for item in items for _, text in item.options])
        gold = np.array([item.gold for item in items])
        picks = [np.array([part.argmin() for part in np.split(scores / sizes, ends)]) for scores in (ours, theirs)]
    else:
        gold, picks = np.ones(len(items)), [np.array(eval_model.is_greedy(flat)), greedy]
    return {"task": task.name, "items": len(items), "accuracy": float(np.mean(picks[0] == gold)),
            "accuracy, PyTorch": float(np.mean(picks[1] == gold)), "same choice": int(np.sum(picks[0] == picks[1])),
            "largest difference of scores, nats": float(np.abs(ours - theirs).max())}


def main() -> None:
    parser = harness.parser(__doc__, limit=100)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a directory or a GGUF file")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--name", default="torch_parity", help="of the results file")
    args: argparse.Namespace = parser.parse_args()
    lm, model = DiffusionLM.from_pretrained(args.model), load_torch(args.model)
    eval_model = make_eval_model(lm.pretrained, "dlm_jax", autoregressive=True)
    start = lm.pretrained.start_token_id
    tasks, texts = [], []
    for name in TASKS:
        task = find_task(name)
        items = load_items(task, find_file(task, args.data_dir), limit=args.limit)
        texts += [item.shown for item in items[:4]]
        tasks.append(compare_task(task, items, eval_model, model, start))
    logits, greedy = compare_logits(lm, model, texts), compare_greedy(lm, model)
    print(f"logits: they differ by at most {logits['largest difference']:.1e} (the largest is "
          f"{logits['largest logit']:.1f}) on {logits['texts']} texts\n"
          f"greedy text: equal for {greedy['equal']} of {greedy['prompts']} prompts, {NEW_TOKENS} tokens each\n")
    print(harness.table_head(*tasks[0]))
    for task in tasks:
        print(harness.row(*(f"{value:.3g}" if isinstance(value, float) else value for value in task.values())))
    harness.write_results(args.name, {"settings": harness.settings(args, "model", "data_dir"), "model": args.model.name,
                                      "logits": logits, "greedy": greedy, "tasks": tasks},
                          "jax", "torch", "transformers")


if __name__ == "__main__":
    main()
