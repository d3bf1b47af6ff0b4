"""Text to token ids: which ids a text has, which token is at position 0, and what identifies a tokenizer."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dlm_jax.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


MARK = "\ufdd0{}\ufdd1"  # spells a special token by its id, in noncharacters, which no text should have


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of a tokenizer remember its results, until the tokenizer has more tokens."""
    by_size = functools.lru_cache(maxsize=8)(lambda tokenizer, size, **options: function(tokenizer, **options))

    @functools.wraps(function)
    def call(tokenizer: "PreTrainedTokenizerBase", **options: Any) -> Any:
        return by_size(tokenizer, len(tokenizer), **options)

    return call


def tokenize(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *,
             special_tokens: bool = False) -> list[list[int]]:
    """Returns the token ids of each text, without special tokens around it and without truncation.

    Args:
      special_tokens: whether special tokens in a text are read as such, as in what a chat template has written.
        By default text is text: in a page that speaks of `</s>`, these are four characters.
    """
    if not tokenizer.is_fast:
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=not special_tokens,
                         return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    # The backend itself is faster than its wrapper in transformers.
    backend = _backend(tokenizer, special_tokens=special_tokens)
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def tokenize_prompt(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Returns the token ids of a prompt, with special tokens if a chat template has written it."""
    ids, = tokenize(tokenizer, [text], special_tokens=is_rendered(tokenizer, text))
    return ids


def is_rendered(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    """Returns whether a chat template has written the text: it starts with a special token other than the mask."""
    return text.startswith(tuple(token for token in tokenizer.all_special_tokens if token != tokenizer.mask_token))


@remembered
def _backend(tokenizer: "PreTrainedTokenizerBase", *, special_tokens: bool) -> "Tokenizer":
    """Returns a copy of the backend that neither truncates nor pads."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not special_tokens
    if not special_tokens and any(found.id == token for name, token in special_tokens_of(tokenizer).items()
                                  for found in backend.model.tokenize(name)):
        return marked_backend(tokenizer)  # the model (Unigram) finds special tokens in text by itself
    return backend


@remembered
def special_tokens_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Returns the ids of the tokens that no text has. (The mask token may be an ordinary token, which texts have.)"""
    ids = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    mask = tokenizer.mask_token
    if mask is not None and mask in (tokenizer.backend_tokenizer.get_vocab(False) if tokenizer.is_fast else ()):
        ids.pop(mask, None)
    return ids


@remembered
def marked_backend(tokenizer: "PreTrainedTokenizerBase", *, read_marks: bool = False) -> "Tokenizer":
    """Returns a copy of the backend in which special tokens are spelled by their marks, so that no text is one.

    Args:
      read_marks: whether marks in a text are read as the tokens they spell.
    """
    import tokenizers

    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {
        "truncation": None, "padding": None, "post_processor": None}
    model, added = state["model"], state["added_tokens"]
    marks = {name: MARK.format(token) for name, token in special_tokens_of(tokenizer).items()}
    for token in added:
        token["content"] = marks.get(token["content"], token["content"])
    if model.get("unk_token") in marks:
        model["unk_token"] = marks[model["unk_token"]]
    if isinstance(model["vocab"], list):  # Unigram
        model["vocab"] = [[marks.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {marks.get(piece, piece): number for piece, number in model["vocab"].items()}
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & marks.keys()]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = not read_marks
    return backend


def id_limit(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Returns 1 + the largest token id: more than the number of tokens where ids are missing between."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def missing_ids(tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int) -> tuple[range, ...]:
    """Returns the ids below `vocab_size` that no token has, such as rows that pad an embedding; () for None."""
    if tokenizer is None:
        return ()
    missing, start = [], 0
    for token in [*sorted(set(tokenizer.get_vocab().values())), vocab_size]:
        if start < min(token, vocab_size):
            missing.append(range(start, min(token, vocab_size)))
        start = token + 1
    return tuple(missing)


def boundary_tokens(tokenizer: "PreTrainedTokenizerBase", add_bos: bool | None = None,
                    packing: str = "concat") -> tuple[int | None, int]:
    """Returns the (BOS or None, EOS) token ids around each document.

    With `add_bos` None, BOS is added where the tokenizer adds it by itself (LLaMA does, GPT-2 does not) and, if there
    is one, where packing is "document_mask": the first position of a document is context.

    Raises:
      DataError: the tokenizer lacks the token.
    """
    name, bos, eos = tokenizer.name_or_path, tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise DataError(f"the tokenizer {name!r} has no EOS token to put between documents")
    if add_bos is None:
        add_bos = bos is not None and (packing == "document_mask" or adds_bos(tokenizer))
    if add_bos and bos is None:
        raise DataError(f"data.add_bos is set, but the tokenizer {name!r} has no BOS token")
    return (bos if add_bos else None), eos


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Returns whether the tokenizer puts BOS before a text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def start_token(tokenizer: "PreTrainedTokenizerBase", add_bos: bool | None = None, packing: str = "concat") -> int:
    """Returns the token at position 0, from which generation starts: what is before a document in training rows.

    That is BOS where rows have it, and otherwise EOS, the end of the document before.

    Raises:
      DataError: the tokenizer has neither.
    """
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    bos, eos = boundary_tokens(tokenizer, add_bos, packing)
    return eos if bos is None else bos


def prepend_start(tokenizer: "PreTrainedTokenizerBase", start: int, tokens: list[int], *, rendered: bool) -> list[int]:
    """Returns a prompt with the token of position 0, which a prompt that a chat template has written may have already.

    Such a prompt gets BOS if rows have it, and never EOS: the template writes its own start.
    """
    if rendered and (tokens[:1] == [start] or start != tokenizer.bos_token_id):
        return tokens
    return [start, *tokens]


# Scripts, spaces, digits, code and special tokens: text that tokenizers with the same vocabulary can treat differently.
PROBE = (
    "Hello  world\n\n\tdef f(x): return 3.14e-10 * x**2  # naïve  café", " a", "a", "12345678 ½ ²",
    "ÀÉ \ufb01 \uff21\uff11 A\u0300", "Привет, мир!", "你好\uff0c こんにちは", "مرحبا हिन्दी 🙂👩\u200d👧",
    "<s> </s> <|endoftext|> [INST]", "\u200b\u00a0\r\n", "",
    "  two leading spaces,   three, and two at the end  ", "class A:\n    def f(self):\n        return [1, 23, 456]\n",
    "| a    | b |\n|------|---|\n|  1.50|-2 |", "don't I'LL we've  X.Y", "".join(f"{' ' * n}x" for n in range(40)),
)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns a short hash of how text becomes ids: the vocabulary, and the ids of some difficult text.

    A mask token that was added at the end does not count, since no text contains it: rows prepared for a base model
    serve the model adapted from it.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if vocabulary[-1][0] == tokenizer.mask_token:
        vocabulary.pop()
    facts = [vocabulary, tokenize(tokenizer, PROBE), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
