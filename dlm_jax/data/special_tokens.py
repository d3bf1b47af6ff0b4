"""Special tokens that someone has spelled out in a conversation: text, while those of its chat template are tokens.

Before a template is rendered, `hide` puts marks in place of such text; `tokenize_rendered` then sees what the template
has written itself. The marks are of noncharacters, which no text should have.
"""

import re
from typing import TYPE_CHECKING, Any

from dlm_jax.data.records import BadRecord
from dlm_jax.data.tokenization import MARK, marked_backend, remembered, special_tokens_of, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = "\ufdd2{}\ufdd3"  # text that spells a special token, by its id
_MARKS = re.compile("[\ufdd0-\ufdd3]")


def hide(tokenizer: "PreTrainedTokenizerBase", value: Any) -> Any:
    """Returns messages, or any other JSON, with marks in place of the special tokens that its texts spell.

    Raises:
      BadRecord: a text has a noncharacter that is one of the marks.
    """
    if isinstance(value, str):
        if mark := _MARKS.search(value):
            raise BadRecord(f"the text has U+{ord(mark[0]):X}, which is not a character; remove it")
        pattern, ids = _special(tokenizer)
        return pattern.sub(lambda match: _TEXT.format(ids[match[0]]), value)
    if isinstance(value, dict):
        return {key: hide(tokenizer, item) for key, item in value.items()}
    return [hide(tokenizer, item) for item in value] if isinstance(value, list) else value


def show(tokenizer: "PreTrainedTokenizerBase", rendered: str) -> str:
    """Returns a rendered text with the texts that `hide` had replaced."""
    return re.sub(_TEXT.format(r"(\d+)"), lambda match: _spelling(tokenizer, int(match[1])), rendered)


def tokenize_rendered(tokenizer: "PreTrainedTokenizerBase", rendered: str) -> list[int]:
    """Returns the token ids of what a template has made of hidden messages: only its own special tokens are tokens.

    Raises:
      BadRecord: a special token is spelled out, and the tokenizer is not one of the library `tokenizers`.
    """
    if not _MARKS.search(rendered):
        row, = tokenize(tokenizer, [rendered], special_tokens=True)
        return row
    if not tokenizer.is_fast:
        raise BadRecord(f"a message spells out a special token, which {type(tokenizer).__name__} cannot read as text")
    pattern, ids = _special(tokenizer)
    backend = marked_backend(tokenizer, read_marks=True)
    text = show(tokenizer, pattern.sub(lambda match: MARK.format(ids[match[0]]), rendered))
    return backend.encode(text, add_special_tokens=False).ids


@remembered
def _special(tokenizer: "PreTrainedTokenizerBase") -> tuple[re.Pattern, dict[str, int]]:
    """Returns a pattern of the special tokens, the longest first, and their ids."""
    ids = special_tokens_of(tokenizer)
    names = sorted(filter(str.strip, ids), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)"), ids


def _spelling(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    return str(tokenizer.added_tokens_decoder[token])
