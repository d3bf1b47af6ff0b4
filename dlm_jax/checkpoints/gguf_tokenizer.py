"""The tokenizer in a GGUF file, as a fast tokenizer of transformers.

A file has the vocabulary, the kind of each token, and merges or scores. Of how text is split before it is merged, it
has only a name, `tokenizer.ggml.pre`, from which llama.cpp chooses regular expressions. Those of the models that this
library computes are here; under another name, text would get other tokens than in training, and the file is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dlm_jax.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # kinds of tokens; 6 is a byte
_SPACE = "\u2581"  # sentencepiece's


class PreTokenizer(NamedTuple):
    """How text is split into words, which are merged one by one.

    Attributes:
      patterns: each splits what the one before has left.
      whole_words: whether a word that is a token is that token, whatever the merges say.
      add_bos: whether BOS is before a text, where the file does not say.
      nfc: whether characters are composed first. llama.cpp does not do this, the models' own tokenizers do.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


_ENGLISH, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
           rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")

PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "phi-2", "trillion"), PreTokenizer((_GPT2,))),
    # Each digit is a word.
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"),
                    PreTokenizer((r"\p{N}", _GPT2))),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0"),
                    PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)),
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), PreTokenizer((_QWEN2,))),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
}


def build_tokenizer(metadata: dict[str, Any], path: Path) -> "PreTrainedTokenizerBase | None":
    """Returns the tokenizer that a file's metadata describe; None if they describe none.

    Raises:
      CheckpointError: it is of a kind or has a pre-tokenizer that is not known here, or a part of it is missing.
    """
    kind = metadata.get(f"{_PREFIX}model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{path} has a tokenizer of the kind {kind!r}; those that can be read are gpt2 "
                              "(byte-level BPE) and llama (sentencepiece)")
    tokens = metadata.get(f"{_PREFIX}tokens") or []
    kinds = metadata.get(f"{_PREFIX}token_type") or [1] * len(tokens)
    if not tokens or len(kinds) != len(tokens):
        raise CheckpointError(f"{path} is damaged: its tokenizer has {len(tokens)} tokens and {len(kinds)} token types")
    if kind == "gpt2":
        backend, add_bos = _byte_level(metadata, path, tokens, kinds)
    else:
        backend, add_bos = _sentencepiece(metadata, path, tokens, kinds), True
    return _finish(backend, metadata, path, tokens, kinds, metadata.get(f"{_PREFIX}add_bos_token", add_bos))


def _byte_level(metadata: dict[str, Any], path: Path, tokens: Sequence[str],
                kinds: Sequence[int]) -> tuple["Tokenizer", bool]:
    """Returns a byte-level BPE, and whether BOS is before a text by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.get(f"{_PREFIX}pre") or ("gpt-2" if metadata.get("general.architecture") == "gpt2" else None)
    if name is None:
        raise CheckpointError(f"{path} does not say how text is split before it is tokenized ({_PREFIX}pre), as files "
                              "of before May 2024; use a file that was converted later")
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(f"{path} names the pre-tokenizer {name!r}, which is not known here; known are "
                              f"{', '.join(PRE_TOKENIZERS)}. Use the model as a Hugging Face checkpoint, which has its "
                              "tokenizer.json")
    splits, merges = PRE_TOKENIZERS[name], metadata.get(f"{_PREFIX}merges")
    if merges is None:
        raise CheckpointError(f"{path} is damaged: its tokenizer has no merges ({_PREFIX}merges)")
    vocabulary = _vocabulary(tokens, kinds)
    backend = Tokenizer(models.BPE(vocabulary, _known_merges(merges, vocabulary, path),
                                   ignore_merges=splits.whole_words))
    if splits.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits.patterns),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend, splits.add_bos


def _sentencepiece(metadata: dict[str, Any], path: Path, tokens: Sequence[str], kinds: Sequence[int]) -> "Tokenizer":
    """Returns sentencepiece's BPE, which merges the pair whose token has the highest score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary, merges = _vocabulary(tokens, kinds), metadata.get(f"{_PREFIX}merges")
    if merges is not None:
        pairs = _known_merges(merges, vocabulary, path)
    else:
        scores = metadata.get(f"{_PREFIX}scores") or []
        if len(scores) != len(tokens):
            raise CheckpointError(f"{path} is damaged: its tokenizer has {len(tokens)} tokens and {len(scores)} scores")
        pairs = _merges_of_scores(vocabulary, scores, kinds)
    unknown = metadata.get(f"{_PREFIX}unknown_token_id", kinds.index(_UNKNOWN) if _UNKNOWN in kinds else None)
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token=None if unknown is None else tokens[unknown],
                                   fuse_unk=True, byte_fallback=True))
    prefix = metadata.get(f"{_PREFIX}add_space_prefix", True)
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                         *strip])
    return backend


def _vocabulary(tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, int]:
    """Returns the ids of tokens without those that only fill up the embedding."""
    return {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}


def _known_merges(merges: Sequence[str], vocabulary: dict[str, int], path: Path) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise CheckpointError(f"{path} is damaged: its tokenizer merges {merge!r}, of which a part or the whole is "
                                  "no token")
        pairs.append((left, right))
    return pairs


def _merges_of_scores(vocabulary: dict[str, int], scores: Sequence[float],
                      kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Returns all pairs of tokens whose concatenation is a normal token, that with the highest score first.

    Of equal scores, as LLaMA 2 has for runs of spaces, sentencepiece merges the leftmost pair, and so grows the first
    token from the left: pairs with a longer left part come first.
    """
    found = [(scores[index], cut, token) for token, index in vocabulary.items() if kinds[index] == _NORMAL
             for cut in range(1, len(token)) if token[:cut] in vocabulary and token[cut:] in vocabulary]
    found.sort(key=lambda pair: (pair[0], pair[1], len(pair[2])), reverse=True)
    return [(token[:cut], token[cut:]) for _, cut, token in found]


def _finish(backend: "Tokenizer", metadata: dict[str, Any], path: Path, tokens: Sequence[str], kinds: Sequence[int],
            add_bos: bool) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer with its special tokens, BOS before a text, and its chat template."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False) for token in defined])
    special = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        index = metadata.get(f"{_PREFIX}{key}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            raise CheckpointError(f"{path} is damaged: {_PREFIX}{key}_token_id is {index}, and there are {len(tokens)} "
                                  "tokens")
        if index is not None:
            special[name] = tokens[index]
    if add_bos and (bos := special.get("bos_token")):
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, tokens.index(bos))])
    others = [token for token in control if token not in special.values()]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=str(path),
                                        clean_up_tokenization_spaces=False, extra_special_tokens=others, **special)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer
