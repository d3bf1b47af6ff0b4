"""The small parts that make a drafter's guesses depend on each other: Markov head, confidence, convolution, selector.

A backbone guesses all tokens of a block at once, each without knowing the others. A Markov head adds logits that depend
on the token before (DSpark); a selector scores a few candidates with it (DFlash2); a convolution mixes the slots of a
block. A new part changes nothing, except a Markov head, whose tables are random.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dlm_jax.matmul import MatmulKind, dense
from dlm_jax.models.layers import Axes, Initializer, Linear, LMHead

if TYPE_CHECKING:
    from dlm_jax.models.drafter import DrafterConfig

_SIDES = 2  # of a layer's branch: its input and its output


class Projection(nnx.Module):
    """A matrix [inputs, outputs] that no layers share, and perhaps a bias."""

    def __init__(self, inputs: int, outputs: int, axes: Axes, init: Initializer, *, bias: bool = False,
                 stddev: float | None = None):
        self.matmul: MatmulKind = init.compute.matmul
        self.kernel = init.normal((inputs, outputs), axes, stddev)
        self.bias = init.full((outputs,), (None,), 0.0) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = dense(x, self.kernel[...].astype(x.dtype), 1, self.matmul)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class MarkovHead(nnx.Module):
    """Logits that depend on the token before, of low rank: a table's row of it, perhaps mixed with the state, times
    another table (DSpark).

    "vanilla" takes the row as it is. "gated" scales it by a gate on the hidden state and the row. "rnn" carries a state
    from slot to slot, which starts with zeros.
    """

    def __init__(self, config: "DrafterConfig", init: Initializer):
        rank, embed, vocab = config.markov_rank, config.layers.hidden_size, config.layers.vocab_size
        self.kind, self.matmul = config.markov_head, init.compute.matmul
        self.previous = init.normal((vocab, rank), ("vocab", "embed"))  # sharded like an embedding
        self.next = init.normal((vocab, rank), ("vocab", "embed"))
        is_gated, is_rnn = self.kind == "gated", self.kind == "rnn"
        self.gate = Projection(rank + embed, rank, (None, None), init, bias=True) if is_gated else None
        self.joint = Projection(2 * rank + embed, 3 * rank, (None, None), init, bias=True) if is_rnn else None

    def embed(self, previous: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Returns the rows [..., rank] of the tokens before, int [...]."""
        return jnp.take(self.previous[...], previous, axis=0).astype(dtype)

    def step(self, previous: jax.Array, hidden: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mixes the token before, int [...], with the slot's hidden state [..., embed] and the head's own [..., rank].

        Returns:
          what `unembed` makes logits of, [..., rank], and the next state.
        """
        row = self.embed(previous, hidden.dtype)
        if self.gate is not None:
            return jax.nn.sigmoid(self.gate(jnp.concatenate([hidden, row], axis=-1))) * row, state
        if self.joint is not None:
            mixed = self.joint(jnp.concatenate([state, row, hidden], axis=-1))
            keep, new, out = jnp.split(mixed, 3, axis=-1)
            keep = jax.nn.sigmoid(keep)
            return jnp.tanh(out), keep * state + (1 - keep) * jnp.tanh(new)
        return row, state

    def steps(self, previous: jax.Array, hidden: jax.Array) -> jax.Array:
        """Runs `step` over the slots of blocks whose tokens are known: int [..., slots] to [..., slots, rank]."""
        start = jnp.zeros((*previous.shape[:-1], self.next.shape[1]), hidden.dtype)
        if self.joint is None:
            return self.step(previous, hidden, start)[0]

        def step(state: jax.Array, slot: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            mixed, state = self.step(*slot, state)
            return state, mixed

        slots = jnp.moveaxis(previous, -1, 0), jnp.moveaxis(hidden, -2, 0)
        return jnp.moveaxis(jax.lax.scan(step, start, slots)[1], 0, -2)

    def unembed(self, mixed: jax.Array) -> jax.Array:
        """Returns float32 logits [..., vocab] of what `step` returns, [..., rank]."""
        return self.lm_head(mixed)

    @property
    def lm_head(self) -> LMHead:
        """What `unembed` applies."""
        return LMHead(self.next[...], True, self.matmul)


class CandidateSelector(nnx.Module):
    """Scores of a few candidates of a slot that depend on the token chosen before it (DFlash2)."""

    def __init__(self, config: "DrafterConfig", init: Initializer):
        rank, embed, vocab = config.selector_rank, config.layers.hidden_size, config.layers.vocab_size
        self.predecessors = init.normal((vocab, rank), ("vocab", "embed"))  # sharded like an embedding
        self.successors = init.normal((vocab, rank), ("vocab", "embed"), stddev=0.0)
        self.projection = Projection(embed, rank, (None, None), init)

    def query(self, previous: jax.Array, hidden: jax.Array) -> jax.Array:
        """Returns what candidates are compared with, float32 [..., rank].

        Args:
          previous: int [...], the token before.
          hidden: [..., embed].
        """
        before = jnp.take(self.predecessors[...], previous, axis=0).astype(jnp.float32)
        return before * self.projection(hidden).astype(jnp.float32)


def score_candidates(query: jax.Array, successors: jax.Array, candidates: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns float32 scores [..., k], the logits of a choice among candidates.

    Args:
      query: float32 [..., rank].
      successors: [vocab, rank].
      candidates: int [..., k], the tokens with the highest logits.
      logits: float32 [..., k], theirs.
    """
    after = jnp.take(successors, candidates, axis=0).astype(jnp.float32)
    return logits + jnp.einsum("...r,...kr->...k", query, after)


class BlockConvolution(nnx.Module):
    """A convolution over the slots of a block, of a branch's input and its output, with weights that the input sets.

    It sees this slot and the ones before it in the block (DFlash2). Each group of channels shares what the input adds
    to the weights. Holds the stacked parameters of all layers.
    """

    def __init__(self, config: "DrafterConfig", init: Initializer):
        layers, taps = config.layers, config.conv_kernel_size
        self.group_size = config.conv_group_size
        identity = jnp.zeros((layers.num_layers, _SIDES, taps, layers.hidden_size), init.dtype).at[:, :, 0].set(1.0)
        self.base = nnx.Param(identity, axes=("layers", None, None, None))
        groups = layers.hidden_size // self.group_size
        self.dynamic = Linear("conv", (layers.hidden_size,), (_SIDES, taps, groups), ("embed", None, None, None),
                              layers.num_layers, False, init, stddev=0.0)

    def kernels(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the weights for the branch's input and for its output, each [batch, length, taps, embed].

        Args:
          x: [batch, length, embed], the branch's input.
        """
        kernels = self.base[...].astype(x.dtype) + jnp.repeat(self.dynamic(x), self.group_size, axis=-1)
        return kernels[:, :, 0], kernels[:, :, 1]


def convolve(x: jax.Array, kernels: jax.Array, block_size: int) -> jax.Array:
    """Convolves `x` [batch, blocks * block_size, embed] within its blocks; outside a block there are zeros.

    Args:
      kernels: [batch, length, taps, embed], each position's weights of itself, of the one before it, ...
    """
    slot = jnp.arange(x.shape[1])[:, None] % block_size
    return sum(kernels[:, :, back] * jnp.where(slot >= back, jnp.roll(x, back, axis=1), 0)
               for back in range(kernels.shape[2]))
