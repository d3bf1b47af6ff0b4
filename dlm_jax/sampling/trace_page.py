"""A trace as one page that plays it: the template `trace.html`, and in it what happened, as JSON."""

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlm_jax.sampling.text import decode
from dlm_jax.sampling.trace import MASKED, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"  # how a part of a character decodes
_LONGEST = 8  # tokens in which a character may begin and end


def page(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", caption: str) -> str:
    """The page as HTML."""
    content = json.dumps(describe(records, tokenizer, caption), ensure_ascii=False, separators=(",", ":"))
    template = pathlib.Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    return template.replace("@TRACE@", content.replace("<", "\\u003c"))  # so that no text can end the script


def describe(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", caption: str) -> dict:
    """What the page shows, as JSON.

    Keys: `texts` of the tokens that occur, to which all others refer by index, MASKED by -1; and of each sample the
    `first` position to show, the `end` of its text, its tokens at the `start`, its `steps` as flat lists of position,
    token and -100 log p, and `joined`, characters that take several tokens, as (first position, count, character).
    """
    ids = sorted({token for record in records for token in
                  [*record.start.tolist(), *(change.token for change in record.changes)]} - {MASKED})
    index = {MASKED: -1, **{token: i for i, token in enumerate(ids)}}
    texts = token_texts(tokenizer, ids)
    samples = []
    for record in records:
        steps: list[list[int]] = [[] for _ in range(record.num_steps)]
        for step, position, token, log_probability in record.changes:
            steps[step - 1] += [position, index[token], round(min(-100 * log_probability, 9999))]
        final = record.at(record.num_steps)[0].tolist()
        samples.append({"first": int(final[0] in tokenizer.all_special_ids), "end": record.end(tokenizer.eos_token_id),
                        "start": [index[token] for token in record.start.tolist()], "steps": steps,
                        "joined": joined(tokenizer, final, dict(zip(ids, texts, strict=True)))})
    return {"caption": caption, "texts": texts, "samples": samples}


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """What each token adds to a text, the space before a word included; of special tokens their name."""
    special = set(tokenizer.all_special_ids)
    return [tokenizer.convert_ids_to_tokens(token) if token in special else _added(tokenizer, [token]) or f"<{token}>"
            for token in ids]


def joined(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int],
           texts: dict[int, str]) -> list[tuple[int, int, str]]:
    """Where several of the `tokens` make up a character: the first position, how many they are, and the text."""
    found, position = [], 0
    while position < len(tokens):
        count, text = 1, texts.get(tokens[position], "")
        if BROKEN in text:
            count, text = _whole(tokenizer, list(itertools.takewhile(lambda token: token != MASKED,
                                                                     tokens[position : position + _LONGEST])))
        if count > 1:
            found.append((position, count, text))
        position += count
    return found


def _whole(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int]) -> tuple[int, str]:
    """The fewest of the first tokens that end where a character does, and their text; 1 where none do."""
    for count in range(2, len(tokens) + 1):
        text = _added(tokenizer, tokens[:count])
        if BROKEN not in text:
            return count, text
    return 1, ""


def _added(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int]) -> str:
    """The text that tokens add to one that stands before them."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    return decode(tokenizer, ["", len(tokens)], [range(len(before), len(before) + len(tokens))], [*before, *tokens])
