"""Head and losses of its logits in one differentiable function: at the scored positions only, a chunk at a time.

The scored positions are sorted to the front, and a loop of as many iterations as they need visits them: exact for any
number of positions, and the logits of one chunk are all that ever exists. Gradients are computed in the same pass, from
a chunk's logits: three matrix products, where a backward pass that recomputes the logits takes four.

Over a mesh each device visits the scored positions that it holds, so the loops differ in length from device to device:
they are inside `shard_map`, with the head gathered before them and its gradient summed and scattered after them. Where
the vocabulary is sharded over a mesh axis, the collectives inside the loops run over that axis only: along it the rows,
and so the numbers of iterations, are the same. Over any other axis they differ, and a collective would deadlock.
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

from dlm_jax.attention import soft_cap, soft_cap_gradient
from dlm_jax.diffusion.teacher import (
    Divergence,
    DivergenceTerms,
    TeacherStates,
    divergence_dlogits,
    divergence_terms,
    entropy,
    entropy_dlogits,
)
from dlm_jax.matmul import MatmulKind, product


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """How the head is sharded and computed.

    Attributes:
      vocab_axis: of the kernel; 0 for a tied table [vocab, embed], 1 for [embed, vocab].
      mesh: the devices; None for one.
      rows: how the mesh shards [batch, length].
      kernel: how it shards the kernel: embed over axes that shard rows too, vocab over others.
      chunk_size: positions whose logits exist at one time.
      max_gradient_bytes: a kernel gradient that exceeds this before it is scattered is computed in blocks of the
        vocabulary, with a fourth matrix product.
      kernel_gradient: whether the kernel is trained; else its gradient is not computed.
      matmul: how matrices are multiplied; see `dlm_jax.matmul`.
      softcap: of the logits; see `soft_cap`.
    """

    vocab_axis: int
    mesh: Mesh | None = None
    rows: PartitionSpec = PartitionSpec(None, None)
    kernel: PartitionSpec = PartitionSpec(None, None)
    chunk_size: int = 512
    max_gradient_bytes: int = 2**28
    kernel_gradient: bool = True
    matmul: MatmulKind = "default"
    softcap: float | None = None

    def mesh_axes(self, *entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
        """Returns the mesh axes named by entries of a partition whose size exceeds 1."""
        names = (name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry or ()))
        return tuple(name for name in names if self.mesh is not None and self.mesh.shape[name] > 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadTargets:
    """What the states are scored against, [batch, length] each, or inside the head [tokens].

    Attributes:
      targets: int32, the token that each state predicts.
      loss_mask: bool; elsewhere nothing is computed, and all results are 0.
      weights: float32, of the cross-entropy in what is minimized.
      confidence_weights: float32, of the entropy where the most likely token is right; None: it does not count.
      divergence_weights: float32, of the divergence from the teacher; None: it does not count.
      teacher: the parent's states; None without a divergence.
    """

    targets: jax.Array
    loss_mask: jax.Array
    weights: jax.Array
    confidence_weights: jax.Array | None = None
    divergence_weights: jax.Array | None = None
    teacher: TeacherStates | None = None


class TokenScores(NamedTuple):
    """Float32, per token.

    Attributes:
      nll: cross-entropy, nats.
      correct: whether the target is the most likely token.
      logsumexp: of the logits.
      divergence: from the teacher, and what its gradient needs; None without a teacher.
      entropy: nats; None if it does not count.
    """

    nll: jax.Array
    correct: jax.Array
    logsumexp: jax.Array
    divergence: DivergenceTerms | None = None
    entropy: jax.Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def head_loss(hidden: jax.Array, kernel: jax.Array, targets: HeadTargets,
              plan: HeadPlan) -> tuple[jax.Array, TokenScores]:
    """Returns the weighted sum of cross-entropy, entropy and divergence over the scored positions, and their values.

    Args:
      hidden: [batch, length, embed]; the state at n is scored against the target at n.
      kernel: [vocab, embed] or [embed, vocab].

    Returns:
      The sum, float32, the one output with a gradient (by `hidden` and `kernel`); and the scores, [batch, length] each,
      0 where not scored.
    """
    scores, _ = _compute(hidden, kernel, targets, plan, gradients=False)
    return _total(scores, targets), scores


def _total(scores: TokenScores, targets: HeadTargets) -> jax.Array:
    total = targets.weights * scores.nll
    if scores.entropy is not None:
        total += targets.confidence_weights * scores.correct * scores.entropy
    if scores.divergence is not None:
        total += targets.divergence_weights * scores.divergence.value
    return jnp.sum(total)


def _forward(hidden: jax.Array, kernel: jax.Array, targets: HeadTargets, plan: HeadPlan) -> tuple:
    scores, grads = _compute(hidden, kernel, targets, plan, gradients=True)
    return (_total(scores, targets), scores), grads


def _backward(plan: HeadPlan, grads: tuple[jax.Array, jax.Array], cotangents: tuple) -> tuple:
    dhidden, dkernel = ((cotangents[0] * grad).astype(grad.dtype) if grad is not None else None for grad in grads)
    return dhidden, dkernel, None


head_loss.defvjp(_forward, _backward)


def _compute(hidden: jax.Array, kernel: jax.Array, targets: HeadTargets, plan: HeadPlan,
             gradients: bool) -> tuple[TokenScores, tuple | None]:
    """Returns the scores and the gradients, or None, of global arrays."""
    local = functools.partial(_on_device, plan=plan, gradients=gradients)
    if plan.mesh is None or plan.mesh.size == 1:
        return local(hidden, kernel, targets)
    states = PartitionSpec(*plan.rows, None)
    specs = jax.tree.map(lambda _: plan.rows, targets)
    if targets.teacher is not None:
        specs = dataclasses.replace(specs, teacher=TeacherStates(states, plan.kernel, targets.teacher.divergence))
    grads = (states, plan.kernel if plan.kernel_gradient else None) if gradients else None
    # Not checked: inside, every sum over devices is explicit, and nothing is differentiated through.
    return jax.shard_map(local, mesh=plan.mesh, in_specs=(states, plan.kernel, specs), out_specs=(plan.rows, grads),
                         check_vma=False)(hidden, kernel, targets)


def _on_device(hidden: jax.Array, kernel: jax.Array, targets: HeadTargets, *, plan: HeadPlan,
               gradients: bool) -> tuple[TokenScores, tuple | None]:
    """Computes `_compute` for one device's rows and its shard of the kernel."""
    embed_axis = 1 - plan.vocab_axis
    shared = plan.mesh_axes(plan.kernel[embed_axis])
    others = tuple(axis for axis in plan.mesh_axes(*plan.rows) if axis not in shared)

    def gather(kernel: jax.Array) -> HeadShard:
        gathered = kernel.astype(hidden.dtype)
        if shared:
            gathered = lax.all_gather(gathered, shared, axis=embed_axis, tiled=True)
        return HeadShard(gathered, plan.vocab_axis, plan.mesh_axes(plan.kernel[plan.vocab_axis]), plan.matmul,
                         plan.softcap)

    head, shape = gather(kernel), targets.targets.shape
    tokens = ScoredTokens(hidden.reshape(-1, hidden.shape[-1]), *(x if x is None else x.ravel() for x in (
        targets.targets, targets.loss_mask, targets.weights, targets.confidence_weights,
        targets.divergence_weights)), None)
    if (teacher := targets.teacher) is not None:
        tokens = tokens._replace(teacher=ScoredTeacher(
            teacher.hidden.astype(hidden.dtype).reshape(-1, hidden.shape[-1]), gather(teacher.kernel),
            teacher.divergence))

    def reduce(gradient: jax.Array) -> jax.Array:
        if shared:
            gradient = lax.psum_scatter(gradient, shared, scatter_dimension=embed_axis, tiled=True)
        return (lax.psum(gradient, others) if others else gradient).astype(kernel.dtype)

    trained, size = gradients and plan.kernel_gradient, head.kernel.size
    num_blocks = math.ceil(4 * size / plan.max_gradient_bytes) if trained and shared else 1
    scores, grads = score_tokens(tokens, head, plan.chunk_size, dhidden=gradients and num_blocks == 1,
                                 dkernel=trained and num_blocks == 1)
    if num_blocks > 1:
        block_size = math.ceil(head.kernel.shape[plan.vocab_axis] / num_blocks)
        grads = gradients_by_block(tokens, head, scores, plan.chunk_size, block_size, reduce)
    elif gradients:
        grads = grads[0], reduce(grads[1]) if trained else None
    grads = (grads[0].reshape(hidden.shape), grads[1]) if gradients else None
    return jax.tree.map(lambda x: x.reshape(shape), scores), grads


class ScoredTeacher(NamedTuple):
    """The parent's states [tokens, embed], its head, and the kind of the divergence."""

    hidden: jax.Array
    head: "HeadShard"
    divergence: Divergence


class ScoredTokens(NamedTuple):
    """The tokens of one device: the inputs of the head, [tokens, embed], and `HeadTargets`, [tokens] each."""

    hidden: jax.Array
    targets: jax.Array
    loss_mask: jax.Array
    weights: jax.Array
    confidence_weights: jax.Array | None
    divergence_weights: jax.Array | None
    teacher: ScoredTeacher | None


class HeadShard(NamedTuple):
    """The output projection, or one device's shard of it along the vocabulary.

    Attributes:
      kernel: [vocab, embed] (a tied table) or [embed, vocab], of the hidden states' type; never transposed.
      vocab_axis: 0 or 1.
      mesh_axes: the mesh axes over which the vocabulary is sharded, in order; empty for all of it.
    """

    kernel: jax.Array
    vocab_axis: int
    mesh_axes: tuple[str, ...] = ()
    matmul: MatmulKind = "default"
    softcap: float | None = None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Computes logits: [tokens, embed] to float32 [tokens, vocab]."""
        return soft_cap(product(hidden, self.kernel, 1, 1 - self.vocab_axis, self.matmul), self.softcap)

    def dhidden(self, dlogits: jax.Array) -> jax.Array:
        """Computes the gradient by hidden states: [tokens, vocab] to float32 [tokens, embed], of this shard only."""
        return product(dlogits.astype(self.kernel.dtype), self.kernel, 1, self.vocab_axis, self.matmul)

    def dkernel(self, hidden: jax.Array, dlogits: jax.Array) -> jax.Array:
        """Computes the gradient by the kernel, float32, in its shape."""
        pair = (dlogits.astype(hidden.dtype), hidden)
        return product(*(pair if self.vocab_axis == 0 else pair[::-1]), 0, 0, self.matmul)

    def all_reduce_vocab(self, reduce: Callable, x: jax.Array) -> jax.Array:
        """Applies `reduce`, such as lax.psum, over the shards of the vocabulary."""
        return reduce(x, self.mesh_axes) if self.mesh_axes else x

    def local(self, targets: jax.Array) -> jax.Array:
        """Returns targets as columns of this shard; those of other shards are outside 0 .. vocab - 1."""
        shard = lax.axis_index(self.mesh_axes) if self.mesh_axes else 0
        return targets - shard * self.kernel.shape[self.vocab_axis]


def score_tokens(tokens: ScoredTokens, head: HeadShard, chunk_size: int, *, dhidden: bool = False,
                 dkernel: bool = False) -> tuple[TokenScores, tuple[jax.Array | None, jax.Array | None]]:
    """Returns the scores, and on request the gradients of the weighted sum.

    The gradients are by the hidden states, in their type, and by the kernel, float32; None where not requested. The
    kernel's is of these tokens only: sums over devices that hold others are left to the caller.
    """
    teacher, reduce = tokens.teacher, head.all_reduce_vocab

    def visit(chunk: jax.Array, carry: tuple) -> tuple:
        scores, hidden_gradient, kernel_gradient = carry
        hidden, targets = (_take(x, chunk) for x in (tokens.hidden, tokens.targets))
        targets, logits = head.local(targets), head.logits(hidden)
        top = reduce(lax.pmax, jnp.max(logits, axis=1))
        logsumexp = top + jnp.log(reduce(lax.psum, jnp.sum(jnp.exp(logits - top[:, None]), axis=1)))
        target_logit = reduce(lax.psum, _pick(logits, targets))
        values = TokenScores(logsumexp - target_logit, (target_logit >= top).astype(jnp.float32), logsumexp)
        teacher_logits = None
        if teacher is not None:
            teacher_logits = teacher.head.logits(_take(teacher.hidden, chunk))
            values = values._replace(divergence=divergence_terms(teacher.divergence, logits, logsumexp, teacher_logits,
                                                                 reduce))
        if tokens.confidence_weights is not None:
            values = values._replace(entropy=entropy(logits, logsumexp, reduce))
        scores = jax.tree.map(lambda x, value: _put(x, chunk, value), scores, values)
        if dhidden or dkernel:
            dlogits = _dlogits(tokens, chunk, logits, teacher_logits, targets, values, head.softcap)
        if dhidden:
            hidden_gradient = _put(hidden_gradient, chunk, reduce(lax.psum, head.dhidden(dlogits)))
        if dkernel:
            kernel_gradient += head.dkernel(hidden, dlogits)
        return scores, hidden_gradient, kernel_gradient

    zero = jnp.zeros(tokens.loss_mask.shape, jnp.float32)
    start = (TokenScores(zero, zero, zero, None if teacher is None else DivergenceTerms(zero, zero, zero),
                         None if tokens.confidence_weights is None else zero),
             jnp.zeros_like(tokens.hidden) if dhidden else None,
             jnp.zeros(head.kernel.shape, jnp.float32) if dkernel else None)
    scores, *grads = _over_chunks(tokens.loss_mask, chunk_size, visit, start)
    return scores, tuple(grads)


def gradients_by_block(tokens: ScoredTokens, head: HeadShard, scores: TokenScores, chunk_size: int, block_size: int,
                       reduce: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `score_tokens`, the kernel's by blocks of `block_size` of the vocabulary.

    For a vocabulary so large that the kernel's gradient, before it is summed and scattered over devices, would be too
    large. It costs a fourth matrix product, as the logits are computed again.

    Args:
      scores: of `score_tokens`.
      reduce: sums a block over devices, and may keep only this device's shard along the embed axis; every device calls
        it equally often.
    """
    vocab, axis, teacher = head.kernel.shape[head.vocab_axis], head.vocab_axis, tokens.teacher
    targets = head.local(tokens.targets)

    def block(index: jax.Array, carry: tuple) -> tuple:
        dhidden, dkernel = carry
        first = jnp.minimum(index * block_size, vocab - block_size)  # the last block overlaps the one before,
        is_new = jnp.arange(block_size) >= index * block_size - first  # and skips the columns that one has counted

        def columns_of(head: HeadShard) -> HeadShard:
            return head._replace(kernel=lax.dynamic_slice_in_dim(head.kernel, first, block_size, axis))

        columns = columns_of(head)

        def visit(chunk: jax.Array, carry: tuple) -> tuple:
            hidden, values = _take(tokens.hidden, chunk), jax.tree.map(lambda x: _take(x, chunk), scores)
            teacher_logits = None
            if teacher is not None:
                teacher_logits = columns_of(teacher.head).logits(_take(teacher.hidden, chunk))
            dlogits = _dlogits(tokens, chunk, columns.logits(hidden), teacher_logits, _take(targets, chunk) - first,
                               values, head.softcap) * is_new
            return (carry[0].at[chunk].add(columns.dhidden(dlogits), mode="drop"),
                    carry[1] + columns.dkernel(hidden, dlogits))

        start = dhidden, jnp.zeros(columns.kernel.shape, jnp.float32)
        dhidden, of_block = _over_chunks(tokens.loss_mask, chunk_size, visit, start)
        before = lax.dynamic_slice_in_dim(dkernel, first, block_size, axis)
        return dhidden, lax.dynamic_update_slice_in_dim(dkernel, before + reduce(of_block), first, axis)

    kernel = jax.eval_shape(reduce, jax.ShapeDtypeStruct(head.kernel.shape, jnp.float32))
    start = jnp.zeros(tokens.hidden.shape, jnp.float32), jnp.zeros(kernel.shape, kernel.dtype)
    dhidden, dkernel = lax.fori_loop(0, -(-vocab // block_size), block, start)
    return head.all_reduce_vocab(lax.psum, dhidden).astype(tokens.hidden.dtype), dkernel


def _over_chunks(loss_mask: jax.Array, chunk_size: int, visit: Callable, carry: object) -> object:
    """Folds `visit(positions [size], carry)` over the scored positions; what pads the last chunk is out of range.

    The remainder after full chunks is visited in quarters of a chunk, so that little is computed in vain.
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


def _dlogits(tokens: ScoredTokens, chunk: jax.Array, logits: jax.Array, teacher_logits: jax.Array | None,
             targets: jax.Array, values: TokenScores, softcap: float | None) -> jax.Array:
    """Returns the gradient of a chunk's weighted sum by its logits [chunk, vocab]; the one-hot is never an array.

    Args:
      logits, teacher_logits: after the soft cap, of all columns of the vocabulary, or of some; the gradient is by the
        logits as they are before it.
      targets: as indices of these columns.
      values: of the chunk, over the full vocabulary.
    """
    p = jnp.exp(logits - values.logsumexp[:, None])
    columns = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    dlogits = _take(tokens.weights, chunk)[:, None] * jnp.where(columns == targets[:, None], p - 1, p)
    if values.entropy is not None:
        weights = _take(tokens.confidence_weights, chunk) * values.correct
        dlogits += weights[:, None] * entropy_dlogits(p, logits, values.logsumexp, values.entropy)
    if (teacher := tokens.teacher) is not None:
        weights = _take(tokens.divergence_weights, chunk)
        dlogits += weights[:, None] * divergence_dlogits(teacher.divergence, p, teacher_logits, values.divergence)
    return soft_cap_gradient(dlogits, logits, softcap)


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns each row's logit at its target, 0 where that is out of range."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    return jnp.where(inside, jnp.take_along_axis(logits, jnp.where(inside, targets, 0)[:, None], axis=1)[:, 0], 0)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _put(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    return x.at[index].set(values.astype(x.dtype), mode="drop")
