"""How good a model is: on tasks, beside its parent, or by how probable it finds held-out text, in nats a token.

For a diffusion model probabilities are bounds, estimated from random maskings; for an autoregressive one exact.

  dlm evaluate --model=runs/first --tasks=hellaswag,lambada --data_dir=tasks --parent=gpt2 --out=results.json
  dlm evaluate --model=runs/first --tasks=gsm8k --data_files gsm8k=test.jsonl --shots=4 --limit=100
  dlm evaluate --model=runs/first --data heldout.jsonl --json=bound.json
  dlm evaluate --model=gpt2 --data heldout.jsonl --objective=autoregressive

Tasks: hellaswag, winogrande, piqa, siqa, lambada, triviaqa, squad, gsm8k, gsm8k_icot, rocstories, text.
"""

import argparse

from dlm_jax.cli import evaluate_tasks, evaluate_text
from dlm_jax.cli.shared import add_json_argument, add_model_arguments
from dlm_jax.errors import ConfigError

_OF_TEXT = {"num_rows": 256, "length": None, "document_separator": "", "text_key": "text"}
_OF_TASKS = {"data_dir": None, "data_files": None, "protocol": "default", "limit": None, "parent": None, "shots": None,
             "num_steps": None, "out": None}


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


def run(arguments: argparse.Namespace) -> None:
    if (arguments.tasks is None) == (arguments.data is None):
        raise ConfigError("name what to evaluate on: --tasks=NAME,... or --data FILE, one of the two")
    foreign, own, kind = ((_OF_TEXT, _OF_TASKS, "--data") if arguments.data is None
                          else (_OF_TASKS, _OF_TEXT, "--tasks"))
    for name in foreign:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name} belongs to {kind}, which is not given; leave it out")
    for name, default in own.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    (evaluate_text if arguments.tasks is None else evaluate_tasks).run(arguments)
