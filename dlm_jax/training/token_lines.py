"""What the model will see, for people, before it trains: how text becomes tokens, and one row of them."""

from pathlib import Path

import numpy as np

from dlm_jax.checkpoints import Pretrained
from dlm_jax.checkpoints.gguf_file import is_gguf
from dlm_jax.checkpoints.tokenizer import compared_file
from dlm_jax.data.config import DataConfig
from dlm_jax.data.rows import RowSource
from dlm_jax.data.tokenization import start_token

_SHOWN = 80  # characters of a text


def token_lines(data: DataConfig, base: Pretrained, rows: RowSource) -> list[str]:
    """Returns lines on the tokenizer, its special tokens, the first of the training rows, and what of it is scored."""
    tokenizer, name, source = base.tokenizer, compared_file(base.tokenizer), Path(base.tokenizer.name_or_path)
    if name is not None:
        check = f"text has the ids of {name}, as tested"
    else:
        check = f"as {source.name} describes it" if is_gguf(source) else "no file to compare it with"
    special = {"BOS": base.bos_token_id, "EOS": base.eos_token_id, "mask": base.diffusion.mask_token_id,
               "generation starts from": start_token(tokenizer, data.add_bos, data.packing)}
    named = ", ".join(f"{kind} {_describe(tokenizer, token)}" for kind, token in special.items())
    row = rows[np.arange(1)]
    tokens, scored = row.tokens[0].astype(int), np.ones(rows.length, bool)
    if row.noisable_mask is not None:
        scored &= row.noisable_mask[0]
    scored[0] = False  # position 0 is context
    lines = [f"tokenizer  {type(tokenizer).__name__}, {len(tokenizer):,} tokens; {check}", f"tokens     {named}",
             f"first row  {_decode(tokenizer, tokens)}"]
    if row.noisable_mask is None:
        return [*lines, "scored     all tokens of a row but the first"]
    return [*lines, f"scored     {scored.sum()} of its {len(scored)} tokens: {_decode(tokenizer, tokens[scored])}"]


def _describe(tokenizer: object, token: int | None) -> str:
    """Returns an id and its token."""
    return "none" if token is None else f"{token} {tokenizer.convert_ids_to_tokens(token)!r}"


def _decode(tokenizer: object, tokens: np.ndarray) -> str:
    """Returns the text of tokens in quotes, without its middle if it is long."""
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    half = _SHOWN // 2
    return repr(text) if len(text) <= _SHOWN else f"{text[:half]!r} ... {text[-half:]!r}"
