"""What the benchmarks share: arguments, timing in turns, tables, figures, and results with device and versions."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
    from dlm_jax import DiffusionLM
    from dlm_jax.diffusion import Batch, ObjectiveConfig
    from dlm_jax.sampling import SamplerConfig
    from dlm_jax.training.optimizer import OptimizerConfig
    from dlm_jax.training.state import Frozen

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
HF_CONFIGS = {  # models that benchmarks build with random weights
    "gpt2-small": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
                   "vocab_size": 50257},
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024,
                    "vocab_size": 50257},
    "smollm2-135m": {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192,
                     "rms_norm_eps": 1e-5, "vocab_size": 49152, "tie_word_embeddings": True},
    "llama2-7b": {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096,
                  "rms_norm_eps": 1e-5, "vocab_size": 32000, "tie_word_embeddings": False},
}
MASK_TOKEN_ID = 811


def parser(doc: str, **numbers: float) -> argparse.ArgumentParser:
    """Returns a parser with the module's docstring, and a flag per number, of its type and with it as default."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items():
        result.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    return result


def settings(args: argparse.Namespace, *omit: str) -> dict[str, object]:
    """Returns the arguments as JSON holds them: paths as text, of absolute ones the last part."""
    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(item) for item in value]
        is_absolute = isinstance(value, str | pathlib.Path) and pathlib.PurePath(value).is_absolute()
        return pathlib.PurePath(value).name if is_absolute else str(value) if isinstance(value, pathlib.Path) else value

    return {name: plain(value) for name, value in vars(args).items() if name not in omit}


def time_in_turns(runs: Mapping[str, Callable[[int], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Returns the seconds of each call.

    The runs take turns, so that other load on the machine affects all of them. The first `warmup` calls, which compile,
    do not count. Each call gets its number.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + warmup):
        for name, run in runs.items():
            started = time.perf_counter()
            run(repeat)
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


class TrainStep:
    """A training step on one device, always on the same tokens int32 [rows, length]; a call runs it and waits."""

    def __init__(self, graphdef: object, params: object, tokens: np.ndarray, objective: "ObjectiveConfig",
                 optimizer: "OptimizerConfig", *, frozen: "Frozen | None" = None, mask_token_id: int = 0,
                 start: int = 0, matmul: str = "default"):
        from dlm_jax.parallel import MeshConfig, make_mesh
        from dlm_jax.training.optimizer import make_optimizer
        from dlm_jax.training.state import Frozen, create_state
        from dlm_jax.training.step import make_train_step

        mesh, rule = make_mesh(MeshConfig(), jax.devices()[:1]), make_optimizer(optimizer, 10**6)
        state = create_state(params, rule, False, mesh, frozen=frozen or Frozen())
        self.state, self._tokens = dataclasses.replace(state, step=state.step + start), tokens
        self._step = make_train_step(graphdef, rule, mesh, objective=objective, config=optimizer, num_steps=10**6,
                                     seed=0, mask_token_id=mask_token_id, matmul=matmul)

    def _batch(self, number: int) -> "Batch":
        from dlm_jax.diffusion import Batch

        rows, length = self._tokens.shape
        return Batch(self._tokens, np.broadcast_to(np.arange(length) > 0, self._tokens.shape),
                     np.arange(rows, dtype=np.uint32) + number * rows)

    def __call__(self, number: int) -> None:
        self.state, metrics = self._step(self.state, self._batch(number))
        jax.block_until_ready((self.state, metrics))

    def program(self) -> str:
        """Returns the compiled step as text."""
        return self._step.lower(self.state, self._batch(0)).compile().as_text()


def random_tokens(vocab_size: int, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (rows, length)).astype(np.int32)


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the median ratio of neighboring calls."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def sample_texts(lm: "DiffusionLM", config: "SamplerConfig", length: int, num_samples: int, batch_size: int,
                 seed: int) -> dict[str, object]:
    """Samples unconditionally.

    Returns:
      `tokens` int [num_samples, length], `seconds` and `tokens_per_second` without compilation, and `forwards`, the
      mean number of forward passes per row.
    """
    from dlm_jax.random import example_keys
    from dlm_jax.sampling import SamplingSpec, sample

    first = lm.pretrained.bos_token_id or lm.pretrained.eos_token_id or 0
    tokens = np.full((batch_size, length), first, np.int32)
    fixed, lengths = np.broadcast_to(np.arange(length) == 0, tokens.shape), np.full(batch_size, length)
    spec = SamplingSpec(config, lm.pretrained.diffusion)

    def run(start: int):
        keys = example_keys(seed, np.arange(start, start + batch_size, dtype=np.uint32))
        return jax.block_until_ready(sample(lm.model, tokens, fixed, lengths, keys, spec))

    run(0)
    started = time.perf_counter()
    batches = [run(start) for start in range(0, num_samples, batch_size)]
    seconds = time.perf_counter() - started
    return {"tokens": np.concatenate([batch.tokens for batch in batches])[:num_samples], "seconds": seconds,
            "forwards": float(np.mean([batch.steps for batch in batches])),
            "tokens_per_second": len(batches) * batch_size * (length - 1) / seconds}


def distinct(tokens: np.ndarray, n: int) -> float:
    """Returns the number of different n-grams divided by the number of n-grams of all rows [rows, length]."""
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1).reshape(-1, n)
    return len(np.unique(grams, axis=0)) / len(grams)


def device_name() -> str:
    """Returns the device as file names hold it: `cpu`, `nvidia-h200`."""
    return jax.devices()[0].device_kind.lower().replace(" ", "-")


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def write_results(name: str, content: dict[str, object], *packages: str) -> None:
    """Writes `content`, with device, processor, Python and versions of `packages`, to results/NAME.json."""
    write_json(name, content | {"device": jax.devices()[0].device_kind, "processor": processor(),
                                "python": platform.python_version(), "versions": versions(*packages)})


def processor() -> str:
    """Returns the CPU's name and its units for bfloat16, as Linux gives them."""
    try:
        first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()
    found = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in first.splitlines() if ":" in line)
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in found.get("flags", "").split()]
    return ", ".join([found.get("model name", platform.machine()), *units])


def write_json(name: str, content: object) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def read_json(name: str, default: object) -> object:
    """Returns what results/NAME.json holds, or `default` if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else default


def table_head(*header: str) -> str:
    """Returns the head of a Markdown table."""
    return row(*header) + "\n" + "| --- " * len(header) + "|"


def row(*cells: object) -> str:
    """Returns a row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


@contextlib.contextmanager
def figure(path: pathlib.Path, columns: int = 1, size: tuple[float, float] = (7, 4.2)) -> Iterator[Sequence[object]]:
    """Yields the axes of a figure of `columns` plots, and saves it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plot, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    yield axes[0]
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=160)
    plt.close(plot)
