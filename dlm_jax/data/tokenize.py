"""Documents as token ids, with the model's own tokenizer."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from dlm_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1000  # documents a call: enough for the tokenizer's threads, little enough for memory


def encode(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", batch_size: int = _BATCH
) -> Iterator[list[int]]:
    """Yields the token ids of each document, in order, without special tokens around it."""
    documents = iter(documents)
    while texts := list(itertools.islice(documents, batch_size)):
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a document may well be longer than the model: packing cuts it
        )
        yield from encoded["input_ids"]


def boundary_tokens(
    tokenizer: "PreTrainedTokenizerBase", *, add_bos: bool | None, segments: bool
) -> tuple[int | None, int]:
    """The (BOS or None, EOS) token ids that packing puts around a document.

    With `add_bos` None, BOS is added where the tokenizer adds it by itself (LLaMA does, GPT-2 does not) and,
    wherever there is one, to segments: a segment's first position is context, and generation starts from BOS.

    Raises:
      DataError: the tokenizer lacks the token.
    """
    name, bos, eos = tokenizer.name_or_path, tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise DataError(f"the tokenizer {name!r} has no EOS token to put between documents")
    if add_bos is None:
        add_bos = bos is not None and (segments or tokenizer("a")["input_ids"][0] == bos)
    if add_bos and bos is None:
        raise DataError(f"data.add_bos is set, but the tokenizer {name!r} has no BOS token")
    return (bos if add_bos else None), eos


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A short hash of all that decides which ids a text becomes."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("truncation", None)  # set by whichever call came last
        state.pop("padding", None)
    else:
        state = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    text = json.dumps([state, tokenizer.bos_token_id, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
