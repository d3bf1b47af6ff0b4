"""What is greedy, against both definitions written out: the most likely token each time, the surest token each time."""

import pathlib

import numpy as np
import pytest

from dlm_jax import AttentionMask, DiffusionLM
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import DataError
from dlm_jax.evaluation.eval_model import Pair
from dlm_jax.evaluation.generation import make_is_greedy

SHIPPED = pathlib.Path(__file__).parents[2] / "assets" / "stories-gpt2"
CONTEXTS = ["The little girl was", "", "Tom"]
LENGTHS = [1, 2, 4]


@pytest.fixture(scope="module")
def lm():
    return DiffusionLM.from_pretrained(SHIPPED, mask_token=4000)


def from_left_to_right(lm, context, length):
    row = list(context)
    for _ in range(length):
        row.append(int(np.argmax(lm.logits(np.array([row]), AttentionMask.causal())[0, -1])))
    return row[len(context):]


def surest_first(lm, context, length):
    row = np.array([*context, *[lm.mask_token_id] * length])
    masked = np.arange(len(row)) >= len(context)
    while masked.any():
        logits = np.array(lm.logits(row[None])[0, :-1], np.float64)  # of the positions from 1 on
        logits[:, lm.mask_token_id] = -np.inf
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        best = np.where(masked[1:], (share / share.sum(axis=1, keepdims=True)).max(axis=1), -1).argmax() + 1
        row[best], masked[best] = logits[best - 1].argmax(), False
    return row[len(context):].tolist()


@pytest.mark.parametrize("autoregressive", [True, False])
def test_what_is_written_is_greedy_and_nothing_else_is(lm, autoregressive):
    write, bos = from_left_to_right if autoregressive else surest_first, lm.pretrained.bos_token_id
    pairs, expected = [], []
    for context, length in zip(CONTEXTS, LENGTHS, strict=True):
        tokens = lm.tokenizer.encode(context)
        written = write(lm, [bos, *tokens], length)
        for place in (None, 0, length - 1):
            changed = [token + (n == place) for n, token in enumerate(written)]
            pairs.append(Pair(tuple(tokens), tuple(changed)))
            expected.append(place is None)
    settings = {"autoregressive": autoregressive, "diffusion": DiffusionSpec(None) if autoregressive else lm.diffusion,
                "bos_token_id": bos}
    assert make_is_greedy(lm.model, **settings)(pairs) == expected
    assert make_is_greedy(lm.model, **settings, batch_size=5)(pairs[::-1]) == expected[::-1]
    assert make_is_greedy(lm.model, **settings)([]) == []


def test_what_does_not_fit_is_refused(lm):
    greedy = make_is_greedy(lm.model, autoregressive=True, diffusion=DiffusionSpec(None))
    with pytest.raises(DataError, match="text 0"):
        greedy([Pair((), (5,))])
    with pytest.raises(DataError, match="0"):
        greedy([Pair((1,) * lm.config.max_length, (5,))])
