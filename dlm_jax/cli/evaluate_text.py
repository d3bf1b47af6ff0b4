"""`dlm evaluate --data`: how probable a model finds held-out text, in nats a token."""

import argparse
import math
import tempfile

from dlm_jax.cli.shared import load_model, write_result
from dlm_jax.errors import ConfigError


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """What is not given stays None; `evaluate` knows the defaults."""
    parser.add_argument("--data", nargs="+", action="extend", metavar="FILE",
                        help="files, globs, a directory made by `dlm prepare`, tfds:NAME, hf:NAME")
    parser.add_argument("--num_rows", type=int, help="rows, from the first (default 256)")
    parser.add_argument("--length", type=int, help="tokens a row (default: as many as the model takes, at most 512)")
    parser.add_argument("--document_separator", help="what parts the documents of a .txt file")
    parser.add_argument("--text_key", help="the key of the text in JSON (default text)")


def run(arguments: argparse.Namespace) -> None:
    from dlm_jax.data.config import DataConfig
    from dlm_jax.data.corpus import load_rows
    from dlm_jax.data.loader import Loader
    from dlm_jax.evaluation import autoregressive_nll, bound

    if arguments.num_rows < 1:
        raise ConfigError(f"--num_rows must be at least 1, got {arguments.num_rows}")
    num_samples = 16 if arguments.num_samples is None else arguments.num_samples
    lm = load_model(arguments)
    length = arguments.length or min(lm.config.max_length, 512)
    if length > lm.config.max_length:
        raise ConfigError(f"--length={length} is more than the {lm.config.max_length} tokens the model takes")
    data = DataConfig(train=tuple(arguments.data), validation_fraction=0.0, length=length,
                      text_key=arguments.text_key, document_separator=arguments.document_separator)
    with tempfile.TemporaryDirectory() as folder:
        (rows,), held_out = load_rows(data, lm.tokenizer, vocab_size=lm.config.vocab_size, cache_dir=folder)
        rows = rows if held_out is None else held_out  # prepared rows may have a held-out part
        batch = Loader([rows], min(len(rows), arguments.num_rows), shuffle=False).batch(0)
    if arguments.objective == "autoregressive":
        estimate = autoregressive_nll(lm.model, batch.tokens, batch.noisable_mask, segment_ids=batch.segment_ids,
                                      batch_size=arguments.batch_size)
    else:
        estimate = bound(lm.model, batch.tokens, batch.noisable_mask, diffusion=lm.diffusion, segment_ids=batch.segment_ids, num_samples=num_samples, seed=arguments.seed,
                         batch_size=arguments.batch_size)
    result = {"model": lm.pretrained.source, "objective": arguments.objective, "data": arguments.data,
              "num_rows": len(batch.tokens), "length": length, "num_tokens": estimate.num_tokens,
              "nats_per_token": estimate.nats_per_token, "standard_error": estimate.standard_error,
              "perplexity": math.exp(estimate.nats_per_token)}
    if arguments.objective == "diffusion":
        result |= {"num_samples": num_samples, "seed": arguments.seed}
    write_result(arguments.json, result, _table(result))


def _table(result: dict) -> str:
    at_most = "at most " if result["objective"] == "diffusion" else ""
    error = f" +- {result['standard_error']:.4f}" if at_most else ""
    lines = {"model": f"{result['model']}, {result['objective']}",
             "text": f"{result['num_tokens']} tokens in {result['num_rows']} rows of {result['length']}",
             "nats per token": f"{at_most}{result['nats_per_token']:.4f}{error}",
             "perplexity": f"{at_most}{result['perplexity']:.2f}"}
    return "\n".join(f"{name:<16}{value}" for name, value in lines.items())
