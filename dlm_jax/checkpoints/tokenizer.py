"""Loads a checkpoint's tokenizer, and finds or adds the mask token."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dlm_jax.checkpoints.hf_config import EXTERNAL_ARCHS
from dlm_jax.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Only tokenizers are used here, so no advice that no deep learning framework is installed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# The classes that AutoTokenizer takes where config.json and tokenizer_config.json agree. Importing AutoTokenizer itself
# imports PyTorch where that is installed, which takes longer than everything else of a short command.
_CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase | None":
    """Returns the tokenizer stored in a checkpoint directory, or None if there is none.

    Raises:
      CheckpointError: its files cannot be read.
    """
    files = {name for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
             if (directory / name).is_file()}
    if not files:
        return None
    import transformers

    try:
        if (name := _plain_class(directory)) is not None:
            return getattr(transformers, name).from_pretrained(directory, local_files_only=True)
        if files == {"tokenizer.model"}:  # a bare sentencepiece model, as LLaMA's: AutoTokenizer does not recognize it
            return transformers.LlamaTokenizer.from_pretrained(directory, add_bos_token=True)
        external = EXTERNAL_ARCHS.get(_model_type(directory))
        # For an unknown model_type, transformers would ask whether to run the checkpoint's own code.
        known = {} if external is None else {"config": transformers.AutoConfig.for_model(external.family)}
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False,
                                                          **known)
    except Exception as error:  # transformers raises many kinds, with advice for other situations
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {str(error).splitlines()[0]}") from error


def _plain_class(directory: Path) -> str | None:
    """Returns the class of a tokenizer that needs no search; None for any other."""
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() and (directory / "tokenizer.json").is_file() else {}
    name = _CLASSES.get(_model_type(directory))
    recorded = (settings.get("tokenizer_class") or "").removesuffix("Fast")
    return name if recorded == name and "auto_map" not in settings else None


def _model_type(directory: Path) -> str | None:
    """Returns the model_type of config.json, None without one."""
    path = directory / "config.json"
    return json.loads(path.read_text()).get("model_type") if path.is_file() else None


def choose_mask_token(mask_token: str | int | None, recorded: int | None, vocab_size: int,
                      tokenizer: "PreTrainedTokenizerBase | None") -> tuple[int | None, bool]:
    """Returns the mask token's id, and whether it is a new token that needs a row of its own.

    Args:
      mask_token: an id, an existing token, or a new token, which is added to the tokenizer in place;
        None: the token that the checkpoint's config.json or else its tokenizer records.
      recorded: the id in the checkpoint's config.json.
      vocab_size: rows of the checkpoint's embedding.

    Raises:
      CheckpointError: the id is outside the vocabulary, or a token is named and there is no tokenizer.
    """
    if isinstance(mask_token, str):
        if tokenizer is None:
            raise CheckpointError(f"the checkpoint has no tokenizer to look up the mask token {mask_token!r}; "
                                  "give its id instead")
        known = tokenizer.get_vocab().get(mask_token)
        if known is None:
            if len(tokenizer) > vocab_size:
                raise CheckpointError(f"the tokenizer has {len(tokenizer)} tokens, more than the {vocab_size} rows of "
                                      "the embedding; the two do not belong together")
            tokenizer.add_special_tokens({"mask_token": mask_token})
            return tokenizer.convert_tokens_to_ids(mask_token), True
        mask_token = known
    if mask_token is None:
        mask_token = recorded
    if mask_token is None and tokenizer is not None:
        mask_token = tokenizer.mask_token_id
    if mask_token is not None and not 0 <= mask_token < vocab_size:
        raise CheckpointError(f"the mask token id {mask_token} is outside the vocabulary of {vocab_size} tokens; "
                              "give the id of an existing token, or a new token by name")
    return mask_token, False
