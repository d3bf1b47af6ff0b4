"""Turns a corpus into rows of tokens, once, for `dlm train` to read at speed.

  dlm prepare --config=diffugpt_s --data 'fineweb/*.parquet' --output=fineweb-rows
  dlm train --config=diffugpt_s --config.data.train=fineweb-rows --workdir=runs/gpt2

The recipe names the tokenizer, length and packing that training needs. If it is stopped, the same command resumes.
Text comes from files (.txt .jsonl .json .parquet .arrow, also .gz and .zst), tfds:NAME and hf:NAME?name=CONFIG.
"""

import argparse
import os
import time

from dlm_jax.cli.paths import check_run
from dlm_jax.cli.shared import add_json_argument, write_result
from dlm_jax.errors import ConfigError

FLAGS = {"data.train": "--data", "model.source": "--tokenizer"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="RECIPE", help="the recipe that will train on the rows (default: none)")
    parser.add_argument("--data", nargs="+", action="extend", metavar="SOURCE",
                        help="files, globs, tfds:NAME or hf:NAME (default: the recipe's data.train)")
    parser.add_argument("--tokenizer", metavar="MODEL",
                        help="a directory, a GGUF file or a hub id (default: the recipe's model.source)")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the rows go, local or gs://...")
    parser.add_argument("--workers", type=int, help="processes that tokenize (default: one per core)")
    parser.add_argument("--shard_size", type=int, default=64, metavar="MIB",
                        help="approximate size of a file, in MiB (default %(default)s)")
    parser.add_argument("--note", default="", help="text kept in the manifest, the license for example")
    parser.add_argument("--config.KEY", dest="overrides", metavar="VALUE", default=[],
                        help="sets a key of the recipe, such as --config.data.length=1024; may be repeated")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    from dlm_jax.cli.config import build_config, load_recipe, train_defaults
    from dlm_jax.training.config import TrainConfig

    recipe = load_recipe(arguments.config) if arguments.config else train_defaults()
    config = build_config(TrainConfig, recipe, arguments.overrides)
    specs, model = arguments.data or config.data.train, arguments.tokenizer or config.model.source
    if not specs:
        raise ConfigError("--data is missing: name files, globs, tfds:NAME or hf:NAME")
    if not model:
        raise ConfigError("--tokenizer is missing: name the model whose tokenizer to use, a directory or hub id")
    workers = os.cpu_count() if arguments.workers is None else arguments.workers
    if workers < 0 or arguments.shard_size < 1:
        raise ConfigError("--workers must be at least 0, and --shard_size at least 1")

    if not arguments.data or not arguments.tokenizer:
        check_run(config)
    from dlm_jax.checkpoints.source import read_recipe, settings_folder
    from dlm_jax.checkpoints.stored import open_stored
    from dlm_jax.data.corpus import open_raw_sources
    from dlm_jax.data.prepare import prepare
    from dlm_jax.training.recorded import settle_data

    tokenizer = open_stored(settings_folder(model)).tokenizer
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer files")
    data = settle_data(config.data, read_recipe(model), tokenizer, model)  # as training from this model will
    start = time.monotonic()
    manifest = prepare(open_raw_sources(data, specs), arguments.output.rstrip("/"), tokenizer,
                       data.rows_config(), workers=workers, shard_bytes=arguments.shard_size << 20,
                       note=arguments.note)
    seconds = time.monotonic() - start
    splits = {name: {"rows": split.rows, "documents": split.documents, "tokens": split.tokens,
                     "files": len(split.shards)} for name, split in manifest.splits.items()}
    result = {"output": arguments.output, "length": manifest.layout.length, "splits": splits, "counts": manifest.counts,
              "bad_records": list(manifest.bad_records), "seconds": round(seconds, 2)}
    write_result(arguments.json, result, _table(result))


def _table(result: dict) -> str:
    lines = [f"{name:<14}{split['rows']:,} rows of {result['length']}: {split['tokens']:,} tokens of "
             f"{split['documents']:,} documents, in {split['files']} files" for name, split in result["splits"].items()]
    lines += [f"{name:<14}{count:,}" for name, count in result["counts"].items()]
    total = sum(split["tokens"] for split in result["splits"].values())
    rate = f" ({total / result['seconds']:,.0f} tokens per second)" if result["seconds"] > 1 else ""
    return "\n".join([*lines, f"{'output':<14}{result['output']}, after {result['seconds']:.0f} s{rate}"])
