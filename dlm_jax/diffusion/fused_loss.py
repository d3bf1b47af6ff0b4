"""Head, cross-entropy and their gradients on one device: at the scored positions only, a chunk at a time.

The scored positions are put first, and a loop of as many trips as they need visits them: exact for any number of
positions, and the logits of one chunk are all that ever exists. The gradients are made in the same pass, while a
chunk's logits are at hand: three matrix products, not the four of a backward pass that makes the logits again.

Where the vocabulary is split over a mesh axis, a device has the logits of its part, and the collectives inside the
loops run over that axis alone: along it the rows, and with them the numbers of trips, are the same. Over any other
axis the numbers differ, and a collective would wait for ever.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec


class ScoredTokens(NamedTuple):
    """What is scored against what.

    Attributes:
      hidden: [tokens, embed], the states the head reads.
      targets: int32 [tokens].
      scored: bool [tokens]; elsewhere nothing is computed, and all that comes out is 0.
      weights: float32 [tokens]; the gradients are those of the sum of weights x cross-entropy.
    """

    hidden: jax.Array
    targets: jax.Array
    loss_mask: jax.Array
    weights: jax.Array


class Scores(NamedTuple):
    """Float32 [tokens] each: nats, whether the target is the likeliest token, and the logits' logsumexp."""

    nll: jax.Array
    correct: jax.Array
    logsumexp: jax.Array


class Head(NamedTuple):
    """The output projection, or this device's part of it.

    Attributes:
      kernel: [vocab, embed] (a tied table) or [embed, vocab], of the hidden states' type; used as it lies.
      vocab_axis: 0 or 1.
      mesh_axes: the mesh axes over which the vocabulary is split, in order; none for the whole of it.
    """

    kernel: jax.Array
    vocab_axis: int
    mesh_axes: tuple[str, ...] = ()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[tokens, embed] to float32 [tokens, vocab]."""
        return _dot(hidden, self.kernel, 1, 1 - self.vocab_axis)

    def hidden_gradient(self, logits_gradient: jax.Array) -> jax.Array:
        """[tokens, vocab] to float32 [tokens, embed], summed over this part of the vocabulary only."""
        return _dot(logits_gradient.astype(self.kernel.dtype), self.kernel, 1, self.vocab_axis)

    def kernel_gradient(self, hidden: jax.Array, logits_gradient: jax.Array) -> jax.Array:
        """Float32, in the shape of the kernel."""
        pair = (logits_gradient.astype(hidden.dtype), hidden)
        return _dot(*(pair if self.vocab_axis == 0 else pair[::-1]), 0, 0)

    def all_reduce_vocab(self, reduce: Callable, x: jax.Array) -> jax.Array:
        """`reduce`, such as lax.psum, over the parts of the vocabulary."""
        return reduce(x, self.mesh_axes) if self.mesh_axes else x

    def local(self, targets: jax.Array) -> jax.Array:
        """Targets as columns of this part; those of other parts fall outside 0 .. vocab - 1."""
        part = lax.axis_index(self.mesh_axes) if self.mesh_axes else 0
        return targets - part * self.kernel.shape[self.vocab_axis]


def score(at: ScoredTokens, head: Head, chunk_size: int, *, dhidden: bool = False,
          dkernel: bool = False) -> tuple[Scores, tuple[jax.Array | None, jax.Array | None]]:
    """The scores and, as wanted, the gradients of sum(weights x nll) by `hidden`, in its type, and by the kernel, in
    float32; None where not.

    The kernel's is of these positions alone: sums over devices that hold others are left to the caller.
    """
    def visit(chunk: jax.Array, carry: tuple) -> tuple:
        scores, hidden_gradient, kernel_gradient = carry
        hidden, targets, weights = (_take(x, chunk) for x in (at.hidden, at.targets, at.weights))
        targets, logits = head.local(targets), head.logits(hidden)
        top = head.all_reduce_vocab(lax.pmax, jnp.max(logits, axis=1))
        logsumexp = top + jnp.log(head.all_reduce_vocab(lax.psum, jnp.sum(jnp.exp(logits - top[:, None]), axis=1)))
        target_logit = head.all_reduce_vocab(lax.psum, _pick(logits, targets))
        found = Scores(logsumexp - target_logit, (target_logit >= top).astype(jnp.float32), logsumexp)
        scores = jax.tree.map(lambda whole, part: _put(whole, chunk, part), scores, found)
        if dhidden or dkernel:
            dlogits = _logits_gradient(logits, logsumexp, targets, weights)
        if dhidden:
            part = head.all_reduce_vocab(lax.psum, head.hidden_gradient(dlogits))
            hidden_gradient = _put(hidden_gradient, chunk, part)
        if dkernel:
            kernel_gradient += head.kernel_gradient(hidden, dlogits)
        return scores, hidden_gradient, kernel_gradient

    zero = jnp.zeros(at.loss_mask.shape, jnp.float32)
    start = (Scores(zero, zero, zero), jnp.zeros_like(at.hidden) if dhidden else None,
             jnp.zeros(head.kernel.shape, jnp.float32) if dkernel else None)
    scores, *grads = _over_chunks(at.loss_mask, chunk_size, visit, start)
    return scores, tuple(grads)


def gradients_by_block(at: ScoredTokens, head: Head, logsumexp: jax.Array, chunk_size: int, block_size: int,
                       reduce: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The gradients of `score`, the kernel's by blocks of `block_size` of the vocabulary, each given to `reduce`.

    For a vocabulary so large that the kernel's gradient, before it is summed and scattered over devices, would be too.
    It costs a fourth matrix product, as the logits are made again.

    Args:
      logsumexp: of `score`.
      reduce: sums a block over devices, and may keep only its part along the embed axis; called equally often by all.
    """
    vocab, axis = head.kernel.shape[head.vocab_axis], head.vocab_axis
    targets = head.local(at.targets)

    def block(index: jax.Array, carry: tuple) -> tuple:
        dhidden, dkernel = carry
        first = jnp.minimum(index * block_size, vocab - block_size)  # the last block overlaps its neighbour,
        fresh = jnp.arange(block_size) >= index * block_size - first  # and leaves out what that has counted
        part = head._replace(kernel=lax.dynamic_slice_in_dim(head.kernel, first, block_size, axis))

        def visit(chunk: jax.Array, carry: tuple) -> tuple:
            hidden, weights, total = (_take(x, chunk) for x in (at.hidden, at.weights, logsumexp))
            dlogits = _logits_gradient(part.logits(hidden), total, _take(targets, chunk) - first, weights) * fresh
            return (carry[0].at[chunk].add(part.hidden_gradient(dlogits), mode="drop"),
                    carry[1] + part.kernel_gradient(hidden, dlogits))

        start = dhidden, jnp.zeros(part.kernel.shape, jnp.float32)
        dhidden, by_block = _over_chunks(at.loss_mask, chunk_size, visit, start)
        before = lax.dynamic_slice_in_dim(dkernel, first, block_size, axis)
        return dhidden, lax.dynamic_update_slice_in_dim(dkernel, before + reduce(by_block), first, axis)

    kernel = jax.eval_shape(reduce, jax.ShapeDtypeStruct(head.kernel.shape, jnp.float32))
    start = jnp.zeros(at.hidden.shape, jnp.float32), jnp.zeros(kernel.shape, kernel.dtype)
    dhidden, dkernel = lax.fori_loop(0, -(-vocab // block_size), block, start)
    return head.all_reduce_vocab(lax.psum, dhidden).astype(at.hidden.dtype), dkernel


def _over_chunks(loss_mask: jax.Array, chunk_size: int, visit: Callable, carry: object) -> object:
    """Folds `visit(positions [size], carry)` over the scored positions; what fills up the last chunk lies outside.

    The rest that does not make up a chunk goes by quarters of one, so that little is computed for nothing.
    """
    tokens, = loss_mask.shape
    quarter = -(-min(chunk_size, tokens) // 4)
    order = jnp.flatnonzero(loss_mask, size=tokens, fill_value=tokens)
    order = jnp.pad(order, (0, 4 * quarter), constant_values=tokens)
    count = jnp.sum(loss_mask)
    chunks = count // (4 * quarter)

    def visit_at(size: int, index: jax.Array, carry: object) -> object:
        return visit(lax.dynamic_slice_in_dim(order, index * size, size), carry)

    carry = lax.fori_loop(0, chunks, functools.partial(visit_at, 4 * quarter), carry)
    return lax.fori_loop(4 * chunks, -(-count // quarter), functools.partial(visit_at, quarter), carry)


def _logits_gradient(logits: jax.Array, logsumexp: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Of sum(weights x nll): weights x (softmax - one-hot), the one-hot a comparison and no array."""
    softmax = jnp.exp(logits - logsumexp[:, None])
    columns = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return weights[:, None] * jnp.where(columns == targets[:, None], softmax - 1, softmax)


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Each row's logit at its target, 0 where that lies outside."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    return jnp.where(inside, jnp.take_along_axis(logits, jnp.where(inside, targets, 0)[:, None], axis=1)[:, 0], 0)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _put(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    return x.at[index].set(values.astype(x.dtype), mode="drop")


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


# ---- The fused loss as one differentiable function, on one device or over a mesh.
#
# Over a mesh each device visits the scored positions that it holds, so the loops differ in length from device to device:
# they stand inside `shard_map`, with the head gathered before them and its gradient summed and scattered after them.


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """How the head lies and how it is worked through.

    Attributes:
      vocab_axis: of the kernel; 0 for a tied table [vocab, embed], 1 for [embed, vocab].
      mesh: the devices; None for one.
      rows: how the mesh splits [batch, length].
      kernel: how it splits the kernel: along embed over axes that split rows too, along vocab over others.
      chunk_size: positions whose logits exist at one time.
      max_gradient_bytes: a kernel gradient that exceeds this before it is scattered is made in blocks of the
        vocabulary, for a fourth matrix product beside three.
      kernel_gradient: whether the kernel has one; that of a kernel which is not trained is not computed.
    """

    vocab_axis: int
    mesh: Mesh | None = None
    rows: PartitionSpec = PartitionSpec(None, None)
    kernel: PartitionSpec = PartitionSpec(None, None)
    chunk_size: int = 512
    max_gradient_bytes: int = 2**28
    kernel_gradient: bool = True

    def mesh_axes(self, *entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
        """Those named by entries of a partition that do split something."""
        names = (name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry or ()))
        return tuple(name for name in names if self.mesh is not None and self.mesh.shape[name] > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def head_loss(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, loss_mask: jax.Array, weights: jax.Array,
              plan: HeadPlan) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum of weights x cross-entropy over the scored positions, and what it is made of.

    Args:
      hidden: [batch, length, embed]; the state at n is scored against the target at n.
      kernel: [vocab, embed] or [embed, vocab].
      targets, scored, weights: int32, bool, float32 [batch, length].

    Returns:
      The sum, float32, the one output with a gradient (by `hidden` and `kernel`); the cross-entropy and whether the
      target is the likeliest token, float32 [batch, length], 0 where not scored.
    """
    nll, correct, _ = _compute(hidden, kernel, targets, loss_mask, weights, plan, gradients=False)
    return jnp.sum(weights * nll), nll, correct


def _forward(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, loss_mask: jax.Array, weights: jax.Array,
             plan: HeadPlan) -> tuple:
    nll, correct, grads = _compute(hidden, kernel, targets, loss_mask, weights, plan, gradients=True)
    return (jnp.sum(weights * nll), nll, correct), grads


def _backward(plan: HeadPlan, grads: tuple[jax.Array, jax.Array], cotangents: tuple) -> tuple:
    dhidden, dkernel = ((cotangents[0] * grad).astype(grad.dtype) if grad is not None else None for grad in grads)
    return dhidden, dkernel, None, None, None


head_loss.defvjp(_forward, _backward)


def _compute(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, loss_mask: jax.Array, weights: jax.Array,
             plan: HeadPlan, gradients: bool) -> tuple:
    """(nll, correct, gradients or None) of global arrays."""
    local = functools.partial(_on_device, plan=plan, gradients=gradients)
    if plan.mesh is None or plan.mesh.size == 1:
        return local(hidden, kernel, targets, loss_mask, weights)
    states = PartitionSpec(*plan.rows, None)
    grads = (states, plan.kernel if plan.kernel_gradient else None) if gradients else None
    # Not checked: inside, every sum over devices is written out, and nothing is differentiated through.
    return jax.shard_map(local, mesh=plan.mesh, in_specs=(states, plan.kernel, plan.rows, plan.rows, plan.rows),
                         out_specs=(plan.rows, plan.rows, grads), check_vma=False)(
                             hidden, kernel, targets, loss_mask, weights)


def _on_device(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, loss_mask: jax.Array, weights: jax.Array, *,
               plan: HeadPlan, gradients: bool) -> tuple:
    """`_compute` for one device's rows and its part of the kernel."""
    embed_axis = 1 - plan.vocab_axis
    parts = plan.mesh_axes(plan.kernel[embed_axis])
    others = tuple(axis for axis in plan.mesh_axes(*plan.rows) if axis not in parts)
    whole = kernel.astype(hidden.dtype)
    if parts:
        whole = lax.all_gather(whole, parts, axis=embed_axis, tiled=True)
    head = Head(whole, plan.vocab_axis, plan.mesh_axes(plan.kernel[plan.vocab_axis]))
    at = ScoredTokens(hidden.reshape(-1, hidden.shape[-1]), targets.ravel(), loss_mask.ravel(), weights.ravel())

    def reduce(gradient: jax.Array) -> jax.Array:
        if parts:
            gradient = lax.psum_scatter(gradient, parts, scatter_dimension=embed_axis, tiled=True)
        return (lax.psum(gradient, others) if others else gradient).astype(kernel.dtype)

    trained = gradients and plan.kernel_gradient
    blocks = math.ceil(4 * whole.size / plan.max_gradient_bytes) if trained and parts else 1
    scores, grads = score(at, head, plan.chunk_size, dhidden=gradients and blocks == 1,
                          dkernel=trained and blocks == 1)
    if blocks > 1:
        block_size = math.ceil(whole.shape[plan.vocab_axis] / blocks)
        grads = gradients_by_block(at, head, scores.logsumexp, plan.chunk_size, block_size, reduce)
    elif gradients:
        grads = grads[0], reduce(grads[1]) if trained else None
    grads = (grads[0].reshape(hidden.shape), grads[1]) if gradients else None
    return scores.nll.reshape(targets.shape), scores.correct.reshape(targets.shape), grads
