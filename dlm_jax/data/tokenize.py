"""Text as token ids, with the model's own tokenizer."""

import array
import dataclasses
import functools
import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm_jax.data.encode import Piece
from dlm_jax.data.records import text_of
from dlm_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class TextForm:
    """Records of running text: each becomes its tokens, with EOS after and perhaps BOS before them."""

    tokenizer: "PreTrainedTokenizerBase"
    text_key: str
    bos: int | None
    eos: int
    planes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text_key,)

    @property
    def facts(self) -> list[int | None]:
        return [self.bos, self.eos]

    def read(self, record: str | dict[str, Any]) -> tuple[str, str] | None:
        text = text_of(record, self.text_key)
        return (text, text) if text.strip() else None

    def encode(self, items: list[str], counts: Counter) -> Piece:
        flat, begins = array.array("I"), []
        head = [] if self.bos is None else [self.bos]
        for ids in encode(self.tokenizer, items):
            begins.append(len(flat))
            flat.fromlist([*head, *ids, self.eos])
        starts = np.zeros(len(flat), bool)
        starts[begins] = True
        return Piece(np.frombuffer(flat, np.uint32), starts)


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens around it, however long it is."""
    if tokenizer.is_fast:  # straight to the tokenizer's own code, which transformers wraps rather slowly
        backend = _backend(tokenizer, len(tokenizer))
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
                     verbose=False)["input_ids"]


@functools.lru_cache(maxsize=4)
def _backend(tokenizer: "PreTrainedTokenizerBase", vocab_size: int):
    """A copy that neither truncates nor pads, whatever the tokenizer was last asked to do; made anew when it grows."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def boundary_tokens(tokenizer: "PreTrainedTokenizerBase", *, add_bos: bool | None,
                    segments: bool) -> tuple[int | None, int]:
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


# Scripts, spaces, digits, code and special tokens: what tokenizers with one vocabulary still treat differently.
_PROBE = (
    "Hello  world\n\n\tdef f(x): return 3.14e-10 * x**2  # naïve  café", " a", "a", "12345678 ½ ²",
    "ÀÉ \ufb01 \uff21\uff11 A\u0300", "Привет, мир!", "你好\uff0c こんにちは", "مرحبا हिन्दी 🙂👩\u200d👧",
    "<s> </s> <|endoftext|> [INST]", "\u200b\u00a0\r\n", "",
)


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A short hash of which ids a text becomes: the vocabulary, and what it makes of some difficult text.

    A mask token that was added at the end does not count, as it stands in no text: rows prepared for a base model
    serve the model adapted from it.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if vocabulary[-1][0] == tokenizer.mask_token:
        vocabulary.pop()
    facts = [vocabulary, encode(tokenizer, list(_PROBE)), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
