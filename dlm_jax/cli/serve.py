"""Serves a model over HTTP, in OpenAI's protocol, with a page to try it.

  dlm serve --model=runs/first
  dlm serve --model=runs/assistant --parent=gpt2 --port=9000
  DLM_API_KEY=secret dlm serve --model=runs/first --host=0.0.0.0

The API is under /v1 (completions, chat/completions, models), the page at /, metrics for Prometheus at /metrics. Without
--host only this machine can reach it.
"""

import argparse
import copy
import importlib.util
import os
import pathlib
import sys
from typing import TYPE_CHECKING

from dlm_jax.cli.shared import add_model_arguments, check_at_least_one, load_model
from dlm_jax.config_fields import check_range
from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from dlm_jax.pipeline import DiffusionLM

FLAGS = {"mask_token=": "--mask_token"}
KEY_VARIABLE = "DLM_API_KEY"
PACKAGES = {"starlette": "starlette", "uvicorn": "uvicorn", "sse_starlette": "sse-starlette", "pydantic": "pydantic",
            "prometheus_client": "prometheus-client"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--parent", metavar="MODEL", help="a second model to serve beside it, such as its AR parent: "
                        "the page compares the two")
    parser.add_argument("--drafter", default="none", help="what guesses tokens for autoregressive decoding where a "
                        "request names nothing else: ngram, self, or a trained drafter (default %(default)s)")
    parser.add_argument("--name", help="how requests name the model (default: the last part of --model)")
    address = parser.add_argument_group("address")
    address.add_argument("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0: all of this "
                         "machine's (default %(default)s)")
    address.add_argument("--port", type=int, default=8000, help="0: any that is free (default %(default)s)")
    address.add_argument("--api_key", metavar="KEY", help="what requests must carry as Authorization: Bearer KEY "
                         f"(default: the environment variable {KEY_VARIABLE}, which other users cannot see)")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max_batch", type=int, default=8, help="texts at a time (default %(default)s)")
    limits.add_argument("--max_queue", type=int, default=64,
                        help="texts that may wait; more are refused with status 429 (default %(default)s)")
    limits.add_argument("--max_tokens", type=int, help="new tokens per text (default: as many as the model takes)")
    limits.add_argument("--time_limit", type=float, default=300.0,
                        help="seconds for a request, waiting included (default %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    check_packages()
    check_at_least_one(arguments, "max_batch", "max_queue", "max_tokens")
    check_range(arguments.port, 0, 65535, "--port")
    check_range(arguments.time_limit, 0, float("inf"), "--time_limit", open_low=True, open_high=True)
    key = api_key(arguments)
    names = model_names(arguments)
    from dlm_jax.serving.server import bind

    with bind(arguments.host, arguments.port) as bound:
        serve(arguments, names, key, bound)


def serve(arguments: argparse.Namespace, names: list[str], key: str | None, bound: "socket.socket") -> None:
    """Loads the models, compiles what usual requests need, and serves until a signal."""
    import jax

    from dlm_jax.serving.app import AppConfig, Service, is_loopback
    from dlm_jax.serving.engine import Engine
    from dlm_jax.serving.jobs import ServedModel, warm_up_jobs
    from dlm_jax.serving.server import address
    from dlm_jax.serving.server import run as run_server

    if jax.process_count() > 1:
        raise ConfigError(f"dlm serve runs in one process, and this run has {jax.process_count()}; start it on one "
                          "host, with --mesh for all of its devices")
    where, is_local = address(bound), is_loopback(arguments.host)
    hosts = frozenset({"localhost", "127.0.0.1", "::1", arguments.host}) if is_local and key is None else None
    if not is_local and key is None:
        print(f"dlm serve: anyone who reaches {where} can use it; set {KEY_VARIABLE} to require a key", file=sys.stderr)
    models = dict(zip(names, load_models(arguments), strict=True))
    served = {name: ServedModel.make(name, lm, max_tokens=arguments.max_tokens, is_parent=number > 0,
                                     drafter="none" if number else arguments.drafter)
              for number, (name, lm) in enumerate(models.items())}
    engine = Engine(models, max_batch=arguments.max_batch, max_queue=arguments.max_queue)
    engine.warm_up([job for model in served.values() for job in warm_up_jobs(model)], show_progress)
    engine.start()
    try:
        service = Service(engine, served, AppConfig(api_key=key, hosts=hosts, time_limit=arguments.time_limit))
        run_server(service, bound, lambda: print(f"serving {' and '.join(names)} at {where} (the API is at {where}/v1)",
                                                 flush=True))
    finally:
        engine.stop(drain=False)


def check_packages() -> None:
    """Raises ConfigError if a package that only this command needs is missing."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"dlm serve needs {', '.join(missing)}; run pip install 'dlm-jax[serve]'")


def api_key(arguments: argparse.Namespace) -> str | None:
    """Returns the key that requests must carry, from the flag or the environment; None where there is none."""
    key = os.environ.get(KEY_VARIABLE) if arguments.api_key is None else arguments.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise ConfigError("the API key is empty, or has characters that a header cannot carry; use letters and digits")
    return key


def model_names(arguments: argparse.Namespace) -> list[str]:
    """Returns how requests name the model and, if there is one, its parent."""
    name = arguments.name or _last_part(arguments.model)
    if not name.isprintable() or not name.strip():
        raise ConfigError(f"the name {name!r} cannot be typed; give one with --name")
    if arguments.parent is None:
        return [name]
    parent = _last_part(arguments.parent)
    return [name, f"{parent}-parent" if parent == name else parent]


def _last_part(model: str) -> str:
    return pathlib.PurePath(model).name.removesuffix(".gguf")


def load_models(arguments: argparse.Namespace) -> "list[DiffusionLM]":
    """Opens the model and, if there is one, its parent; both with the same type and mesh."""
    lm = load_model(arguments)
    lm.model_with_drafter(arguments.drafter)  # loads it now, not at the first request
    if arguments.parent is None:
        return [lm]
    parent = copy.copy(arguments)
    parent.model, parent.base, parent.mask_token = arguments.parent, None, None
    return [lm, load_model(parent)]


def show_progress(done: int, total: int) -> None:
    """Shows in a line how many programs are compiled; elsewhere than in a terminal, once."""
    if sys.stderr.isatty():
        print(f"\rcompiling: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == 0:
        print(f"compiling {total} programs", file=sys.stderr, flush=True)
