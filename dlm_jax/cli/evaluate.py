"""How good a model is: on tasks, beside its parent, or by how probable it finds held-out text, in nats a token.

For a diffusion model probabilities are bounds, estimated from random maskings; for an autoregressive one exact.

  dlm evaluate --model=runs/first --tasks=hellaswag,lambada --data_dir=tasks --parent=gpt2 --out=results.json
  dlm evaluate --model=runs/first --tasks=gsm8k --data_files gsm8k=test.jsonl --shots=4 --limit=100
  dlm evaluate --model=runs/first --data heldout.jsonl --json=bound.json
  dlm evaluate --model=gpt2 --data heldout.jsonl --objective=autoregressive
  dlm evaluate --model=runs/gsm8k --examples test.txt --json=answers.json
  dlm evaluate --model=runs/first --lm_eval=lambada_openai,arc_easy --parent=gpt2

Tasks: hellaswag, winogrande, piqa, siqa, lambada, triviaqa, squad, gsm8k, gsm8k_cot, gsm8k_icot, mawps, mawps_cot,
satmath, satmath_cot, rocstories, humaneval_infilling (it runs programs: --allow_code_execution), text,
reconstruction, generation. Those of --lm_eval are the tasks of lm-eval, the field's harness, with its prompts and
metrics.
"""

import argparse

from dlm_jax.cli import evaluate_examples, evaluate_lm_eval, evaluate_tasks, evaluate_text, evaluate_writing
from dlm_jax.cli.shared import add_json_argument, add_model_arguments
from dlm_jax.errors import ConfigError

_MODES = {"tasks": evaluate_tasks, "data": evaluate_text, "examples": evaluate_examples,
          "lm_eval": evaluate_lm_eval}
# What each takes beside the arguments of all, with the defaults.
_WRITING = dict.fromkeys(evaluate_writing.FLAGS)
_BOTH = {"limit": None, "parent": None, "shots": None, "out": None} | _WRITING
_OWN = {"tasks": {"data_dir": None, "data_files": None, "protocol": "default", "mc_estimator": "mask_count",
                  "prompt_file": None, "samples": 1, "temperature": None, "judge": None,
                  "allow_code_execution": False} | _BOTH,
        "data": {"num_rows": 256, "length": None, "document_separator": "", "text_key": "text"},
        "examples": {"limit": None} | _WRITING,
        "lm_eval": {"lm_eval_dir": None} | _BOTH}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--objective", choices=("diffusion", "autoregressive"), default="diffusion",
                        help="what the model is evaluated as (default %(default)s)")
    parser.add_argument("--num_samples", type=int, help="maskings of each row or option (default 16; under the "
                        "protocol release its T, 32)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows at a time (default %(default)s)")
    add_json_argument(parser)
    evaluate_tasks.add_arguments(parser.add_argument_group("tasks"))
    evaluate_text.add_arguments(parser.add_argument_group("held-out text"))
    evaluate_examples.add_arguments(parser.add_argument_group("examples of fine-tuning"))
    evaluate_lm_eval.add_arguments(parser.add_argument_group("the field's harness"))
    evaluate_writing.add_arguments(parser.add_argument_group("how texts are written: tasks, examples, harness"))


def run(arguments: argparse.Namespace) -> None:
    given = [name for name in _MODES if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise ConfigError("name what to evaluate on: --tasks=NAME,..., --data FILE, --examples FILE or "
                          "--lm_eval=TASK,..., one of the four")
    mode, = given
    for other in _OWN:
        for name in _OWN[other]:
            if name not in _OWN[mode] and getattr(arguments, name) is not None:
                owners = " or ".join(f"--{owner}" for owner in _OWN if name in _OWN[owner])
                raise ConfigError(f"--{name} belongs to {owners}, which is not given; leave it out")
    for name, default in _OWN[mode].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    _MODES[mode].run(arguments)
