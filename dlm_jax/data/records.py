"""Raw records on their way from a source to a tokenizer, and what can be wrong with one."""

import array
import dataclasses
import functools
import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dlm_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Payload = bytes | str | dict[str, Any]  # a line of JSON not yet parsed, a text, or a record


class BadRecord(ValueError):
    """A record that cannot be used; the message is the reason alone."""


class BrokenSource(DataError):
    """A source that cannot be read from some record on."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive records of one source, as it gave them.

    Attributes:
      source: the file or dataset, as messages show it.
      unit: what the source counts its records in: "line", "item", "row", "document".
      first: the number of the first record, from 1.
      payloads: the records.
      broken: says that the source cannot be read from here on.
    """

    source: str
    unit: str
    first: int
    payloads: list[Payload]
    broken: str | None = None

    def where(self, number: int) -> str:
        return f"{self.source}, {self.unit} {number}"


def record_of(payload: Payload) -> str | dict[str, Any]:
    """The record of a payload: bytes are parsed as JSON, a blank line is an empty text.

    Raises:
      BadRecord: not JSON, or neither a text nor a record.
    """
    if isinstance(payload, bytes):
        try:
            payload = json.loads(payload) if payload.strip() else ""
        except ValueError as error:  # also not UTF-8
            raise BadRecord(f"not JSON ({error})") from error
    if not isinstance(payload, str | dict):
        raise BadRecord(f"{type(payload).__name__} where a text or a record was expected")
    return payload


def text_of(record: str | dict[str, Any], key: str) -> str:
    """A record's text: the record itself, or what it has under `key`.

    Raises:
      BadRecord: there is none, or it is not valid Unicode.
    """
    if isinstance(record, dict):
        if key not in record:
            raise BadRecord(f"no key {key!r} (it has {', '.join(map(str, record))})")
        record = record[key]
    if not isinstance(record, str):
        raise BadRecord(f"{type(record).__name__} under {key!r} where text was expected")
    try:
        record.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise BadRecord(f"not valid Unicode ({error.reason})") from error
    return record


# ---- From chunks of raw records to pieces of tokens: what worker processes of `prepare` do.


@dataclasses.dataclass(frozen=True)
class TokenSpan:
    """Documents or examples laid end to end.

    Attributes:
      tokens: uint32 [tokens].
      starts: bool [tokens]; True where a document begins.
      maskable: bool [tokens], where a token may be noised and scored; None: everywhere.
    """

    tokens: np.ndarray
    starts: np.ndarray
    noisable_mask: np.ndarray | None = None


class RecordEncoder(Protocol):
    """What records hold, and how they become tokens. Picklable: workers get a copy."""

    columns: tuple[str, ...] | None  # the keys of a record that are read; None: all
    row_masks: tuple[str, ...]  # what its rows carry beside tokens, of `rows.ROW_MASKS`
    facts: list[Any]  # what else decides the tokens, beside settings and tokenizer; JSON can hold it

    def read(self, record: str | dict[str, Any]) -> tuple[str, Any] | None:
        """(the text whose hash decides whether it is held out, an item for `encode`); None for a blank record.

        Raises:
          BadRecord: the record cannot be used.
          DataError: it must not be left out silently, whatever the policy for bad records.
        """

    def encode(self, items: list[Any], counts: Counter) -> TokenSpan:
        """The tokens of some items; what is worth counting is added to `counts`."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Attributes:
    parts: the piece of each part ("train", "validation") that got any document.
    counts: documents and tokens of each part, as "train.documents", and what the form counts.
    bad: of each record that cannot be used, where it is and why.
    """

    parts: dict[str, TokenSpan]
    counts: Counter
    bad: list[str]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Reads the records of a chunk, parts off what is held out, and tokenises; a pure function of the chunk."""

    form: RecordEncoder
    validation_fraction: float = 0.0

    def __call__(self, chunk: Chunk) -> Encoded:
        items: dict[str, list] = {"train": [], "validation": []}
        bad = [chunk.broken] if chunk.broken else []
        for number, payload in enumerate(chunk.payloads, chunk.first):
            try:
                found = self.form.read(record_of(payload))
            except BadRecord as error:
                bad.append(f"{chunk.where(number)}: {error}")
                continue
            except DataError as error:
                raise DataError(f"{chunk.where(number)}: {error}") from error
            if found is not None:
                key, item = found
                items["validation" if is_held_out(key, self.validation_fraction) else "train"].append(item)
        counts: Counter = Counter()
        parts = {part: self.form.encode(held, counts) for part, held in items.items() if held}
        for part, piece in parts.items():
            counts[f"{part}.documents"] += len(items[part])
            counts[f"{part}.tokens"] += len(piece.tokens)
        return Encoded(parts, counts, bad)


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document is in the held-out part: by a hash of its text, whatever its neighbours."""
    if not fraction:
        return False
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


# ---- Text as token ids, with the model's own tokenizer.


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Records of running text: each becomes its tokens, with EOS after and perhaps BOS before them."""

    tokenizer: "PreTrainedTokenizerBase"
    text_key: str
    bos: int | None
    eos: int
    row_masks: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text_key,)

    @property
    def facts(self) -> list[int | None]:
        return [self.bos, self.eos]

    def read(self, record: str | dict[str, Any]) -> tuple[str, str] | None:
        text = text_of(record, self.text_key)
        return (text, text) if text.strip() else None

    def encode(self, items: list[str], counts: Counter) -> TokenSpan:
        flat, begins = array.array("I"), []
        head = [] if self.bos is None else [self.bos]
        for ids in encode(self.tokenizer, items):
            begins.append(len(flat))
            flat.fromlist([*head, *ids, self.eos])
        starts = np.zeros(len(flat), bool)
        starts[begins] = True
        return TokenSpan(np.frombuffer(flat, np.uint32), starts)


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


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A short hash of which ids a text becomes: the vocabulary, and what it makes of some difficult text.

    A mask token that was added at the end does not count, as it stands in no text: rows prepared for a base model
    serve the model adapted from it.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if vocabulary[-1][0] == tokenizer.mask_token:
        vocabulary.pop()
    facts = [vocabulary, encode(tokenizer, list(_PROBE)), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
