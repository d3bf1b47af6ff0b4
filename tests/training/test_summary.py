"""What a run says of its tokens before it trains, against the rows themselves."""

import numpy as np

from dlm_jax.checkpoints import load_pretrained
from dlm_jax.data.config import DataConfig
from dlm_jax.data.rows import Rows
from dlm_jax.training.summary import token_lines


def said(base, rows, **data):
    return {line.split()[0]: line for line in token_lines(DataConfig(**data), base, rows)}


def test_lines_say_what_rows_hold(test_data):
    base = load_pretrained(test_data / "stories260K_hf", mask_token="<|mask|>", init="abstract")
    text = "Once upon a time there was a dog. " * 5 + "The end."
    tokens = np.array([base.tokenizer.encode(text)[:40]])
    lines = said(base, Rows(tokens))
    assert all(f"{name} {token} {spelled!r}" in lines["tokens"] for name, token, spelled in (
        ("BOS", 1, "<s>"), ("EOS", 2, "</s>"), ("mask", 512, "<|mask|>"), ("from", 1, "<s>")))
    assert "tokenizer.model" in lines["tokenizer"] and "Once upon a time" in lines["first"]
    assert len(lines["first"]) < 130

    noisable = np.zeros(tokens.shape, bool)
    noisable[:, :2] = noisable[:, 30:33] = True
    scored = base.tokenizer.decode([tokens[0, 1], *tokens[0, 30:33]])
    assert "4 of its 40" in (line := said(base, Rows(tokens, None, noisable))["scored"]) and repr(scored) in line


def test_position_0_and_absent_tokens(test_data):
    base = load_pretrained(test_data / "stories260K_hf", init="abstract")
    rows = Rows(np.array([[1, 403, 407]]))
    assert "mask none" in said(base, rows)["tokens"] and "from 2 '</s>'" in said(base, rows, add_bos=False)["tokens"]
    base.tokenizer.name_or_path = "elsewhere"
    assert "tokenizer.model" not in said(base, rows)["tokenizer"]
