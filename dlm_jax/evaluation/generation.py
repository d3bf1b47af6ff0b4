"""Generation for the evaluation: continuations and infills in batches, and greedy checks."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.eval_model import Generate, GenerationRequest, IsGreedy, Pair
from dlm_jax.models import Transformer
from dlm_jax.random import example_keys
from dlm_jax.sampling import GAP, SamplerConfig, SamplingSpec, sample_rows
from dlm_jax.sampling.batching import SamplingStats
from dlm_jax.sampling.gap_length import infer_gap_lengths
from dlm_jax.sampling.spec import Network
from dlm_jax.sampling.text import Segment, decode, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_generate(model: Network, tokenizer: "PreTrainedTokenizerBase", config: SamplerConfig, *,
                  diffusion: DiffusionSpec, bos_token_id: int, eos_token_id: int | None, seed: int = 0,
                  batch_size: int = 16, mesh: Mesh | None = None, keep_bos: bool = True,
                  stats: SamplingStats | None = None) -> Generate:
    """Returns a `Generate` that samples with `config`. A continuation ends at its first EOS token.

    Prompts that are too long are cut from the left. Texts on both sides of a gap are cut at the ends that are far from
    it; each keeps at least half of the room, if it needs that much.

    A generated text is a function of the seed, the item and the sample, never of the other requests or the batch size.
    Of several lengths `sampling.gap_length` chooses one; without a text after the gap the longest is used.

    Args:
      diffusion: mask token, shift and blocks of the model.
      keep_bos: whether position 0 holds BOS. Otherwise it holds the first token of the prompt.
      stats: counts what is done.

    Raises:
      ConfigError: there is a text after a gap and the policy is autoregressive.
    """
    encoder = functools.partial(encode, tokenizer, start=bos_token_id)
    eos_token_ids = () if eos_token_id is None else (eos_token_id,)

    def generate(requests: Sequence[GenerationRequest], *, temperature: float, num_steps: int | None) -> list[str]:
        settings: dict[str, float | int] = {"temperature": temperature}
        if config.policy != "autoregressive" and num_steps is not None:
            settings["num_steps"] = num_steps
        segments = with_fixed_lengths(requests)
        rows, gaps = [], []
        for text in segments:
            row, (gap,) = encoder(text)
            surplus = max(len(row) - model.config.max_length, 0) if len(text) == 2 else 0
            if surplus >= gap.start and surplus:
                raise _no_room(gap, model.config.max_length)
            first = 0 if keep_bos or gap.start == 1 else 1
            rows.append([*row[first:1], *row[1 + surplus :]])
            gaps.append(range(gap.start - surplus - first, gap.stop - surplus - first))
        filled = fill(rows, requests, dataclasses.replace(config, **settings))
        texts = [decode(tokenizer, text, [gap], row, eos_token_ids if len(text) == 2 else ())
                 for text, gap, row in zip(segments, gaps, filled, strict=True)]
        return [found[len(text[0]) : len(found) - len(text[2]) if len(text) > 2 else None]
                for found, text in zip(texts, segments, strict=True)]

    def with_fixed_lengths(requests: Sequence[GenerationRequest]) -> list[list[Segment]]:
        """Returns the segments of each request, every gap an int. The samples of an item share one gap length."""
        items = list(dict.fromkeys(request._replace(sample=0) for request in requests))
        segments = [_shortened([item.before, item.lengths, item.after] if item.after
                               else [item.before, item.lengths[-1]], encoder, tokenizer, model.config.max_length)
                    for item in items]
        segments = [[segment[0] if isinstance(segment, range) and len(segment) == 1 else segment for segment in text]
                    for text in segments]
        undecided = [number for number, text in enumerate(segments) if any(isinstance(x, range) for x in text)]
        if undecided:
            decided = infer_gap_lengths(model, [segments[number] for number in undecided], encoder,
                                        diffusion=diffusion, batch_size=batch_size, mesh=mesh)
            for number, text in zip(undecided, decided, strict=True):
                segments[number] = text
        of_item = dict(zip(items, segments, strict=True))
        return [of_item[request._replace(sample=0)] for request in requests]

    def fill(rows: Sequence[Sequence[int]], requests: Sequence[GenerationRequest],
             config: SamplerConfig) -> list[np.ndarray]:
        keys = _sample_keys(seed, requests)
        result: list[np.ndarray] = [np.zeros(0, np.int32)] * len(rows)
        # Infilling and continuation are two compiled programs: only the latter stops at EOS.
        for infilling in (False, True):
            spec = SamplingSpec(config, diffusion, eos_token_ids, stop_at_eos=not infilling and bool(eos_token_ids))
            members = [i for i, request in enumerate(requests) if bool(request.after) == infilling]
            filled = sample_rows(model, [rows[i] for i in members], keys[np.array(members, int)], spec,
                                 batch_size=batch_size, mesh=mesh, stats=stats)
            for i, row in zip(members, filled, strict=True):
                result[i] = row
        return result

    return generate


def make_is_greedy(model: Transformer, *, diffusion: DiffusionSpec, bos_token_id: int | None = None,
                   batch_size: int = 16, mesh: Mesh | None = None) -> IsGreedy:
    """Returns an `IsGreedy` of a diffusion model, which generates as many tokens as each continuation has.

    It starts from that many mask tokens after the context and reveals its most confident token in each forward pass, so
    it knows the length of the answer, as in LLaDA's evaluation (arXiv 2502.09992). Nothing is random. A result does not
    depend on the other pairs or the batch size.

    Args:
      bos_token_id: precedes every context; None: nothing does.
      batch_size: rows per forward pass.
      mesh: splits a batch over devices.

    Raises:
      DataError: a pair does not fit the model, or has neither BOS nor a context.
    """
    length = model.config.max_length
    config = SamplerConfig(policy="confidence", temperature=0.0, num_steps=length)  # one token per step
    spec = SamplingSpec(config, diffusion)
    head = [] if bos_token_id is None else [bos_token_id]

    def is_greedy(pairs: Sequence[Pair]) -> list[bool]:
        rows = [[*head, *pair.context, *[GAP] * len(pair.continuation)] for pair in pairs]
        keys = example_keys(0, jnp.zeros(len(rows), jnp.uint32))
        filled = sample_rows(model, rows, keys, spec, batch_size=batch_size, mesh=mesh)
        return [tuple(row[len(row) - len(pair.continuation) :].tolist()) == tuple(pair.continuation)
                for row, pair in zip(filled, pairs, strict=True)]

    return is_greedy


def _sample_keys(seed: int, requests: Sequence[GenerationRequest]) -> jax.Array:
    """Returns a key per request [requests]: its item's key, from which later samples derive theirs."""
    samples = jnp.array([request.sample for request in requests], jnp.uint32)
    keys = example_keys(seed, jnp.array([request.item for request in requests], jnp.uint32))
    return jnp.where(samples == 0, keys, jax.vmap(jax.random.fold_in)(keys, samples))


def _shortened(segments: list[Segment], encoder: Callable[[Sequence[Segment]], tuple[list[int], list[range]]],
               tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Segment]:
    """Cuts the texts on both sides of a gap so that the row fits at the longest gap; other segments are unchanged."""
    row, (gap,) = encoder(segments)
    if len(segments) == 2 or len(row) <= max_length:
        return segments
    text = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before, after = row[1 : gap.start], row[gap.stop :]
    for room in range(max_length - 1 - len(gap), -1, -1):  # less room where a cut text tokenizes into more tokens
        kept = min(len(after), max(room // 2, room - len(before)))
        space = " " if segments[0].endswith(" ") else ""
        shortened = [text(before[len(before) - min(room - kept, len(before)) :]) + space, segments[1],
                     text(after[:kept])]
        if len(encoder(shortened)[0]) <= max_length:
            return shortened
    raise _no_room(gap, max_length)


def _no_room(gap: range, max_length: int) -> ConfigError:
    return ConfigError(f"{len(gap)} new tokens leave no room for a prompt in the {max_length} tokens that the model "
                       "takes")
