"""Scores under causal attention: texts that begin alike share their start, and rows are full.

The state of a token does not depend on what follows it. So the options of an item are one tree: what they begin with,
computed once, and a branch for each option. Trees of any length are packed into rows of one width, which costs little
padding and few compiled programs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.attention import AttentionMask
from dlm_jax.attention.mask import MAX_BRANCHES
from dlm_jax.config_fields import check_at_least
from dlm_jax.diffusion import cross_entropy, token_nll, top1_correct
from dlm_jax.diffusion.loss import Measure
from dlm_jax.evaluation.eval_model import MaskedAccuracy, Pair, Score, ScoreAndIsGreedy
from dlm_jax.evaluation.scoring import one_ahead, pad_width, round_batch, run_batch, token_rows
from dlm_jax.matmul import jit_model
from dlm_jax.models import ModelConfig, Transformer
from dlm_jax.parallel import num_batch_shards

_ROW_WIDTH = 256  # tokens of a packed row; one with a longer text is as long as needed
_TEXTS_PER_ROW = 4  # of `batch_size`, so that a batch has about as many tokens as without packing
_HEAD_CHUNK = 16  # scored tokens per row whose logits exist at one time


def autoregressive_score(model: Transformer, *, bos_token_id: int | None = None, batch_size: int = 16,
                         mesh: Mesh | None = None) -> Score:
    """Returns an exact `Score` [pairs] of an autoregressive model.

    Args:
      bos_token_id: precedes the context of a pair with `add_bos`; None: position 0 holds its first token.
      batch_size: texts in one forward pass, about: a quarter as many rows, which pairs share. So a score depends on the
        other pairs, but by rounding alone.
      mesh: splits a batch over devices.
    """
    values = functools.partial(token_values, model, measure=cross_entropy, bos_token_id=bos_token_id,
                               batch_size=batch_size, mesh=mesh)
    return lambda pairs: np.array([nll.sum(dtype=np.float64) for nll in values(pairs)])


def score_and_is_greedy(model: Transformer, *, bos_token_id: int | None = None, batch_size: int = 16,
                        mesh: Mesh | None = None) -> ScoreAndIsGreedy:
    """Returns a `ScoreAndIsGreedy` of an autoregressive model; arguments as in `autoregressive_score`."""
    values = functools.partial(token_values, model, measure=_nll_and_correct, bos_token_id=bos_token_id,
                               batch_size=batch_size, mesh=mesh)

    def score(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        found = values(pairs)
        return (np.array([nll.sum(dtype=np.float64) for nll, _ in found]),
                np.array([bool(correct.all()) for _, correct in found], bool))

    return score


def causal_accuracy(model: Transformer, *, bos_token_id: int | None = None, batch_size: int = 16,
                    mesh: Mesh | None = None) -> MaskedAccuracy:
    """Returns a `MaskedAccuracy` of an autoregressive model; arguments as in `autoregressive_score`."""
    values = functools.partial(token_values, model, measure=top1_correct, bos_token_id=bos_token_id,
                               batch_size=batch_size, mesh=mesh)

    def accuracy(pairs: Sequence[Pair], masked: Sequence[np.ndarray]) -> np.ndarray:
        different = list(dict.fromkeys(pairs))  # what is masked does not change what the model predicts
        correct = dict(zip(different, values(different), strict=True))
        return np.array([correct[pair][mask].mean() for pair, mask in zip(pairs, masked, strict=True)])

    return accuracy


def _nll_and_correct(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cross_entropy(logits, targets), top1_correct(logits, targets)


def token_values(model: Transformer, pairs: Sequence[Pair], measure: Measure, *, bos_token_id: int | None = None,
                 batch_size: int = 16, mesh: Mesh | None = None) -> list[Any]:
    """Returns a measure of each pair's continuation, token by token: for each pair a tree of float32 [length].

    Args: as in `autoregressive_score`.

    Raises:
      ConfigError: the batch size is less than 1.
      DataError: a pair has no continuation, nothing before it, or too many tokens.
    """
    check_at_least(batch_size, 1, "batch_size")
    config, found = model.config, [None] * len(pairs)
    # The model does not see the last token, which is only predicted.
    rows = token_rows(pairs, bos_token_id, longest=config.max_length + 1, max_length=config.max_length)
    trees = _grow_trees(rows, pairs, config)
    packed = _pack(trees, config.max_length)
    shards = num_batch_shards(mesh)
    batch_size = -(-batch_size // (_TEXTS_PER_ROW * shards)) * shards
    graphdef, params = nnx.split(model)

    def values_of(batch: Sequence["_Row"]) -> Any:
        arrays = _arrays(batch, round_batch(len(batch), batch_size, shards))
        return run_batch(functools.partial(_token_values, graphdef, params, measure=measure), arrays, mesh)

    for batch, values in one_ahead(values_of, _batches(packed, batch_size)):
        values = jax.tree.map(np.asarray, values)
        for number, row in enumerate(batch):
            for place, tree in row.trees:
                for branch, _, scored in _branch_places(place, tree):
                    found[branch.pair] = jax.tree.map(lambda x, at=(number, scored): x[at], values)
    return found


class _Branch(NamedTuple):
    """The tokens of a pair after the start of its tree: what the model sees, and what follows each, int [length]."""

    pair: int
    tokens: np.ndarray
    next_tokens: np.ndarray


class _Tree(NamedTuple):
    """Texts with a common start, int [length]."""

    start: np.ndarray
    branches: tuple[_Branch, ...]

    @property
    def size(self) -> int:
        """The number of tokens."""
        return len(self.start) + sum(len(branch.tokens) for branch in self.branches)

    def join(self, tokens: np.ndarray, branch: _Branch) -> "_Tree":
        """Adds a branch to the text `tokens`; what it does not share with the start moves into the branches."""
        shared = min(len(self.start), len(tokens))
        differs = np.flatnonzero(self.start[:shared] != tokens[:shared])
        shared = int(differs[0]) if len(differs) else shared
        moved, new = self.start[shared:], tokens[shared:]
        grown = [_Branch(pair, np.concatenate([moved, rest]), following) for pair, rest, following in self.branches]
        return _Tree(self.start[:shared], (*grown, branch._replace(tokens=np.concatenate([new, branch.tokens]))))


def _grow_trees(rows: Sequence[np.ndarray], pairs: Sequence[Pair], config: ModelConfig) -> list[_Tree]:
    """Returns the trees of all rows; successive pairs of an item share one if that makes it smaller.

    The token that predicts the first one of the continuation is in the branch: each option has its own.
    """
    # In a row of several branches, the distance to the start is not that within a text.
    limit = min(config.max_length, config.sliding_window or config.max_length)
    trees: list[_Tree] = []
    item = None
    for number, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        first = len(row) - len(pair.continuation) - 1
        branch = _Branch(number, row[first:-1], row[first + 1 :])
        if trees and pair.item == item and len(trees[-1].branches) < MAX_BRANCHES - 1:
            joined = trees[-1].join(row[:first], branch)
            if joined.size <= min(limit, trees[-1].size + len(row) - 1):
                trees[-1] = joined
                continue
        trees.append(_Tree(row[:first], (branch,)))
        item = pair.item
    return trees


class _Row:
    """Trees in one row, one after the other."""

    def __init__(self, width: int):
        self.width, self.used, self.trees = width, 0, []

    def add(self, tree: _Tree) -> None:
        self.trees.append((self.used, tree))
        self.used += tree.size


def _pack(trees: Sequence[_Tree], max_length: int) -> list[_Row]:
    """Returns rows that hold all trees, the widest first: each tree, from the largest on, goes where there is room."""
    rows: list[_Row] = []
    for tree in sorted(trees, key=lambda tree: -tree.size):
        row = next((row for row in rows if row.used + tree.size <= row.width), None)
        if row is None:
            row = _Row(max(min(_ROW_WIDTH, max_length), pad_width(tree.size, max_length)))
            rows.append(row)
        row.add(tree)
    return rows


def _batches(rows: Sequence[_Row], batch_size: int) -> Iterator[Sequence[_Row]]:
    """Yields rows of one width, at most `batch_size` at a time."""
    first = 0
    while first < len(rows):
        batch = [row for row in rows[first : first + batch_size] if row.width == rows[first].width]
        yield batch
        first += len(batch)


class _Arrays(NamedTuple):
    """A batch of rows, each [batch, width]; see `AttentionMask.with_branches`."""

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    branch_ids: np.ndarray
    targets: np.ndarray  # the token after each, where `scored`
    scored: np.ndarray


def _arrays(rows: Sequence[_Row], batch_size: int) -> _Arrays:
    """Returns the arrays of rows; unused places are a segment of their own."""
    shape = batch_size, rows[0].width
    arrays = _Arrays(*(np.zeros(shape, np.int32) for _ in range(5)), np.zeros(shape, bool))
    for number, row in enumerate(rows):
        for segment, (place, tree) in enumerate(row.trees, 1):
            arrays.segment_ids[number, place : place + tree.size] = segment
            here = slice(place, place + len(tree.start))
            arrays.tokens[number, here], arrays.positions[number, here] = tree.start, np.arange(len(tree.start))
            for index, (branch, here, scored) in enumerate(_branch_places(place, tree), 1):
                arrays.tokens[number, here], arrays.branch_ids[number, here] = branch.tokens, index
                arrays.positions[number, here] = len(tree.start) + np.arange(len(branch.tokens))
                arrays.targets[number, scored], arrays.scored[number, scored] = branch.next_tokens, True
    return arrays


def _branch_places(place: int, tree: _Tree) -> Iterator[tuple[_Branch, slice, slice]]:
    """Yields the branches of a tree at `place`, where in the row each is, and where what predicts scored tokens is."""
    place += len(tree.start)
    for branch in tree.branches:
        end = place + len(branch.tokens)
        yield branch, slice(place, end), slice(end - len(branch.next_tokens), end)
        place = end


@functools.partial(jit_model, static_argnames=("graphdef", "measure"))
def _token_values(graphdef: nnx.GraphDef, params: nnx.State, arrays: _Arrays, *, measure: Measure) -> Any:
    """Returns a measure of the token after each scored one, a tree of [batch, width]."""
    model = nnx.merge(graphdef, params)
    attention = AttentionMask.causal().with_branches(arrays.segment_ids, arrays.branch_ids)
    hidden = model.hidden(arrays.tokens, attention, positions=arrays.positions)
    return token_nll(hidden, model.unembed, arrays.targets, arrays.scored, shift=False, chunk_size=_HEAD_CHUNK,
                     measure=measure)
