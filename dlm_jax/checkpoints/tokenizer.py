"""Loads a checkpoint's tokenizer, and finds or adds the mask token."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm_jax.checkpoints.hf_config_diffusion import DIFFUSION_FAMILIES
from dlm_jax.data.tokenization import PROBE, id_limit, special_tokens_of, tokenize
from dlm_jax.errors import CheckpointError
from dlm_jax.storage import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Only tokenizers are used here, so no advice that no deep learning framework is installed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# The classes that AutoTokenizer takes where config.json and tokenizer_config.json agree. Importing AutoTokenizer itself
# imports PyTorch where that is installed, which takes longer than everything else of a short command.
_CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase | None":
    """Returns the tokenizer stored in a checkpoint directory, or None if there is none.

    transformers may choose a class for the architecture that builds its own tokenizer around the stored vocabulary.
    Text must get the ids of the stored file, with which the model was trained: where the class gives others, the file
    is loaded as it is.

    Raises:
      CheckpointError: its files cannot be read, or loaded so that text gets the ids of the stored file.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    files = {name for name in names if (directory / name).is_file()}
    if not files:
        return None
    try:
        stored = _read_stored(directory)
        tokenizer = None if files == {"tokenizer.model"} else _load_class(directory)
        if tokenizer is None or (stored is not None and _difference(tokenizer, *stored) is not None):
            tokenizer = _load_as_stored(directory, tokenizer)
    except Exception as error:  # transformers raises many kinds, with advice for other situations
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {str(error).splitlines()[0]}") from error
    if stored is not None and (text := _difference(tokenizer, *stored)) is not None:
        raise CheckpointError(f"{stored[0]} and {type(tokenizer).__name__}, which transformers makes of it, give other "
                              f"tokens for {text!r}; store the tokenizer as a tokenizer.json with the right tokens")
    return tokenizer


def _load_class(directory: Path) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer of the class that transformers chooses for the architecture."""
    import transformers

    if (name := _plain_class(directory)) is not None:
        return getattr(transformers, name).from_pretrained(directory, local_files_only=True)
    external = DIFFUSION_FAMILIES.get(_model_type(directory))
    if external is not None and external.family in _CLASSES and not (directory / "tokenizer.json").is_file():
        # Dream names a class of its own, whose vocabulary and rules are those of the family's.
        return getattr(transformers, _CLASSES[external.family]).from_pretrained(directory, local_files_only=True)
    # For an unknown model_type, transformers would ask whether to run the checkpoint's own code.
    known = {} if external is None else {"config": transformers.AutoConfig.for_model(external.family)}
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False,
                                                      **known)


def _load_as_stored(directory: Path, named: "PreTrainedTokenizerBase | None") -> "PreTrainedTokenizerBase":
    """Returns the tokenizer of tokenizer.json or of the sentencepiece model, with the special tokens of `named`."""
    from transformers import PreTrainedTokenizerFast

    settings = {} if named is None else {name: token for name, token in named.special_tokens_map.items()
                                         if isinstance(token, str)}
    recorded = _read_settings(directory / "tokenizer_config.json")
    if not (directory / "tokenizer.json").is_file() and "add_bos_token" not in recorded:
        settings["add_bos_token"] = True  # as LLaMA's tokenizer, whose file is a sentencepiece model
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True, **settings)
    if not (directory / "tokenizer.json").is_file():
        _compose_accents(tokenizer)
        if recorded.get("legacy") is False:
            _add_space_to_first_text(tokenizer)
    return tokenizer


def _compose_accents(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Composes letters and their accents before a sentencepiece normalizer that ignores case.

    `tokenizers` takes the shortest entry of its table that a letter with accents starts with, and so loses the accents.
    """
    from tokenizers import normalizers

    found = tokenizer.backend_tokenizer.normalizer
    has_table = "Precompiled" in tokenizer.backend_tokenizer.to_str().partition('"pre_tokenizer"')[0]
    if has_table and found.normalize_str("A\u0300") != found.normalize_str("\u00c0"):
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), found])


def _add_space_to_first_text(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Puts sentencepiece's space before the first text alone, not before one that follows a special token.

    transformers omits it also before a text that starts with a space of its own. Spaces are "\u2581" here already, so a
    step that adds one where there is none adds one always.
    """
    from tokenizers import pre_tokenizers

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = (state["pre_tokenizer"] or {}).get("pretokenizers", [state["pre_tokenizer"]])
    if steps == [{"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}]:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace("\u2581", prepend_scheme="never", split=False)])


def compared_file(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Returns the name of the stored file whose ids text was found to get; None where no such file is stored."""
    names = (name for name in ("tokenizer.json", "tokenizer.model") if (Path(tokenizer.name_or_path) / name).is_file())
    return next(names, None)


Encode = Callable[[list[str]], list[list[int]]]


def _read_stored(directory: Path) -> tuple[Path, Encode, list[str]] | None:
    """Returns the file that decides which ids a text has, its encoding, and tokens to test; None for other files.

    Special tokens in a text are not read as such, see `data.tokenization.tokenize`.
    """
    if (path := directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        tokens = sorted(backend.get_vocab(with_added_tokens=False))
        return path, lambda texts: [row.ids for row in backend.encode_batch(texts, add_special_tokens=False)], tokens
    if (path := directory / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(path))
        kinds = (model.is_byte, model.is_control, model.is_unknown, model.is_unused)
        pieces = [model.id_to_piece(token) for token in range(len(model)) if not any(kind(token) for kind in kinds)]
        return path, model.encode, [piece.replace("\u2581", " ") for piece in pieces]
    return None


def _difference(tokenizer: "PreTrainedTokenizerBase", path: Path, encode: Encode, tokens: list[str]) -> str | None:
    """Returns a text to which `tokenizer` and the stored file give different ids; None if there is none.

    The texts are difficult ones, and up to 2,000 tokens of the vocabulary, each before the next. Some files find
    special tokens in text; these texts are not compared.
    """
    tokens = [token for token in tokens if token not in tokenizer.all_special_tokens]
    some = tokens[:: max(len(tokens) // 2000, 1)]
    texts = [*PROBE, *(first + second for first, second in itertools.pairwise(some))]
    pairs = zip(texts, tokenize(tokenizer, texts), encode(texts), strict=True)
    named = special_tokens_of(tokenizer)
    special = {*tokenizer.all_special_ids, *named.values()} - {tokenizer.unk_token_id}
    return next((text for text, found, expected in pairs if found != expected and special.isdisjoint(expected)), None)


def _plain_class(directory: Path) -> str | None:
    """Returns the class of a tokenizer that needs no search; None for any other."""
    settings = {}
    if (directory / "tokenizer.json").is_file():
        settings = _read_settings(directory / "tokenizer_config.json")
    recorded, name = settings.get("tokenizer_class") or "", _CLASSES.get(_model_type(directory))
    if recorded == "PreTrainedTokenizerFast":  # what `save_tokenizer` writes
        return None if "auto_map" in settings else recorded
    return name if recorded.removesuffix("Fast") == name and "auto_map" not in settings else None


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Writes a tokenizer so that transformers 4.5x and 5 both read its tokenizer.json as it is.

    The class that transformers 5 records may be unknown to 4, or compute settings of its own, as LLaMA's does there.
    """
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        return
    path = folder / "tokenizer_config.json"
    settings = read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(extra := settings.pop("extra_special_tokens", None), list):  # only 5 takes a list under this name
        settings["additional_special_tokens"] = extra
    if named := settings.pop("model_specific_special_tokens", extra if isinstance(extra, dict) else None):
        settings["extra_special_tokens"] = named
    write_json(path, settings)


def _model_type(directory: Path) -> str | None:
    """Returns the model_type of config.json, None without one."""
    return _read_settings(directory / "config.json").get("model_type")


def _read_settings(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def choose_mask_token(mask_token: str | int | None, recorded: int | None, vocab_size: int,
                      tokenizer: "PreTrainedTokenizerBase | None",
                      default: str | int | None = None) -> tuple[int | None, bool]:
    """Returns the mask token's id, and whether it is a new token that needs a row of its own.

    Args:
      mask_token: an id, an existing token, or a new token, which is added to the tokenizer in place;
        None: the token that the checkpoint's config.json or else its tokenizer records, or else `default`.
      recorded: the id in the checkpoint's config.json.
      vocab_size: rows of the checkpoint's embedding.

    Raises:
      CheckpointError: the id is outside the vocabulary, or that of BOS or EOS; the name is blank; or a token is named
        and there is no tokenizer.
    """
    if mask_token is None:
        mask_token = recorded
    if mask_token is None and tokenizer is not None:
        mask_token = tokenizer.mask_token_id
    if mask_token is None:
        mask_token = default
    if isinstance(mask_token, str):
        if not mask_token.strip():
            raise CheckpointError(f"the mask token {mask_token!r} is blank; give the name or the id of a token")
        if tokenizer is None:
            raise CheckpointError(f"the checkpoint has no tokenizer to look up the mask token {mask_token!r}; "
                                  "give its id instead")
        known = tokenizer.get_vocab().get(mask_token)
        if known is None:
            if id_limit(tokenizer) > vocab_size:
                raise CheckpointError(f"the tokenizer has ids up to {id_limit(tokenizer) - 1}, more than the "
                                      f"{vocab_size} rows of the embedding; the two do not belong together")
            return _add_mask_token(tokenizer, mask_token, 0 if recorded is None else recorded + 1), True
        mask_token = known
    if mask_token is not None and not 0 <= mask_token < vocab_size:
        raise CheckpointError(f"the mask token id {mask_token} is outside the vocabulary of {vocab_size} tokens; "
                              "give the id of an existing token, or a new token by name")
    for name in ("bos_token", "eos_token"):
        if mask_token is not None and getattr(tokenizer, f"{name}_id", None) == mask_token:
            raise CheckpointError(f"the mask token {mask_token} is also the tokenizer's {name}, "
                                  f"{getattr(tokenizer, name)!r}; choose another token, or a new one by name")
    return mask_token, False


def _add_mask_token(tokenizer: "PreTrainedTokenizerBase", name: str, least: int) -> int:
    """Adds a mask token to the tokenizer in place and returns its id: one that no token has, at least `least`."""
    new_id = max(id_limit(tokenizer), least)
    if new_id != len(tokenizer):  # where ids are missing, `tokenizers` could give one that is taken
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        if isinstance(state["model"].get("vocab"), dict):
            from tokenizers import Tokenizer

            state["model"]["vocab"][name] = new_id
            tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(state)).model
    tokenizer.add_special_tokens({"mask_token": name})
    if (found := tokenizer.convert_tokens_to_ids(name)) != new_id:
        raise CheckpointError(f"the tokenizer cannot give the new mask token {name!r} the id {new_id} (it gives "
                              f"{found}); use the id or the name of an existing token")
    return new_id
