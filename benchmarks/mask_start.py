"""How a new mask token is started: its row of the embedding table, and noise on its embeddings in the first steps.

    python benchmarks/mask_start.py --base=assets/stories-gpt2 --data assets/stories-text/train.jsonl \\
        --validation assets/stories-text/heldout.jsonl

adapts the base, in blocks of 4 and as full diffusion, with each start of the mask token's row: the mean of all rows, as
the library does; zeros; the row of the end of text; a random row with the mean and the spread of the table. `noise`
starts from the mean, and adds to each embedding of a mask, in the first tenth of the steps, independent normal noise as
wide as the table, so that no two masks are alike (LLaDA2.0 has such noise; its width is not published). All starts read
the same rows. Prints the held-out bound after a tenth of the steps and at the end, and writes
benchmarks/results/mask_start.json.
"""

import argparse
import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from unittest import mock

import harness
import jax
import jax.numpy as jnp
import numpy as np
import objectives
from safetensors.numpy import load_file, save_file

from dlm_jax import DiffusionLM
from dlm_jax.models import transformer
from dlm_jax.training import read_records, train
from dlm_jax.training.diffusion_loss import DiffusionLoss

MASK = "<|mask|>"
STARTS = ("mean", "zeros", "end of text", "random", "noise")
STRUCTURES = ("blocks of 4", "full diffusion")
TABLES = ("wte.weight", "embed_tokens.weight")


def start_row(name: str, table: np.ndarray, mask: int, eos: int) -> np.ndarray:
    """Returns the row of the mask token, [embed], of a table [vocab, embed] whose row `mask` is the mean."""
    others = np.delete(table, mask, axis=0)
    match name:
        case "zeros":
            return np.zeros_like(table[mask])
        case "end of text":
            return table[eos]
        case "random":
            return np.random.default_rng(0).normal(others.mean(axis=0), others.std(axis=0)).astype(table.dtype)
        case _:
            return table[mask]


def write_base(args: argparse.Namespace, start: str) -> tuple[pathlib.Path, float, int]:
    """Writes the base with a mask token that has this start; returns its folder, the table's spread, and the token."""
    lm, folder = DiffusionLM.from_pretrained(args.base, mask_token=MASK), args.work / "bases" / start.replace(" ", "_")
    if not folder.exists():
        lm.save_pretrained(folder)
    path, mask = folder / "model.safetensors", lm.mask_token_id
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(TABLES))
    table = np.array(tensors[name])
    table[mask] = start_row(start, table, mask, lm.tokenizer.eos_token_id)
    save_file(tensors | {name: table}, path, metadata={"format": "pt"})
    return folder, float(table.std()), mask


@contextlib.contextmanager
def embedding_noise(width: float, mask: int, num_steps: int) -> Iterator[None]:
    """Adds noise of a standard deviation to the embeddings of masks in the first steps of training."""
    steps, embed, loss = [], transformer.Embedding.__call__, DiffusionLoss.__call__

    def noisy_loss(self: DiffusionLoss, params: object, frozen: object, batch: object, step: jax.Array,
                   batch_size: int) -> object:
        steps.append(None if self.evaluates else step)
        try:
            return loss(self, params, frozen, batch, step, batch_size)
        finally:
            steps.pop()

    def noisy_embed(self: transformer.Embedding, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
        vectors = embed(self, index, dtype)
        if not steps or steps[-1] is None or not jnp.ndim(index):
            return vectors
        noise = width * jax.random.normal(jax.random.fold_in(jax.random.key(0), steps[-1]), vectors.shape, dtype)
        return vectors + jnp.where((index == mask)[..., None] & (steps[-1] < num_steps), noise, 0)

    with (mock.patch.object(transformer.Embedding, "__call__", noisy_embed),
          mock.patch.object(DiffusionLoss, "__call__", noisy_loss)):
        yield


def run(args: argparse.Namespace, structure: str, start: str, seed: int) -> dict[str, float]:
    """Trains one run and returns its bounds."""
    folder, width, mask = write_base(args, start)
    config = objectives.configure(argparse.Namespace(**vars(args) | {"base": str(folder), "mask_token": None}),
                                  structure, "bound", seed)
    num_steps, tenth = config.num_steps // 10 * 10, config.num_steps // 10
    config = dataclasses.replace(config, num_steps=num_steps,
                                 validation=dataclasses.replace(config.validation, every=tenth))
    workdir = args.work / f"{structure}-{start}-{seed}".replace(" ", "_")
    with embedding_noise(width, mask, tenth) if start == "noise" else contextlib.nullcontext():
        train(config, workdir)
    records = {record["step"]: record["bound"] for record in read_records(workdir, "validation")}
    return {"tenth": records[tenth], "end": records[config.num_steps]}


def main() -> None:
    parser = harness.parser(__doc__, seeds=2, tokens=200_000, batch_size=8, length=128, learning_rate=1.5e-3,
                            validation_rows=64)
    parser.add_argument("--base", required=True, help="the AR base model, which has no mask token")
    parser.add_argument("--data", nargs="+", required=True, help="paths or globs of text")
    parser.add_argument("--validation", nargs="+", required=True, help="paths of held-out text")
    parser.add_argument("--dtype", default="auto", help="of activations, default %(default)s")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("mask_start_runs"))
    args = parser.parse_args()
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for structure in STRUCTURES:
        for start in STARTS:
            found.setdefault(structure, {})[start] = [run(args, structure, start, seed) for seed in range(args.seeds)]
            harness.write_results("mask_start", {"runs": found, "settings": harness.settings(args, "work")}, "jax")
    for structure, starts in found.items():
        print(f"\n{structure}\n\n{harness.table_head('start', 'bound after a tenth of the steps', 'at the end')}")
        for start, seeds in starts.items():
            print(harness.row(start, *(objectives.mean_and_error([seed[when] for seed in seeds])
                                       for when in ("tenth", "end"))))


if __name__ == "__main__":
    main()
