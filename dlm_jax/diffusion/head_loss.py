"""The fused loss as one differentiable function, on one device or over a mesh.

Over a mesh each device visits the scored positions that it holds, so the loops differ in length from device to device:
they stand inside `shard_map`, with the head gathered before them and its gradient summed and scattered after them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dlm_jax.diffusion.fused import Head, Positions, gradients_by_block, score


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
def head_loss(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, scored: jax.Array, weights: jax.Array,
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
    nll, correct, _ = _compute(hidden, kernel, targets, scored, weights, plan, gradients=False)
    return jnp.sum(weights * nll), nll, correct


def _forward(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, scored: jax.Array, weights: jax.Array,
             plan: HeadPlan) -> tuple:
    nll, correct, grads = _compute(hidden, kernel, targets, scored, weights, plan, gradients=True)
    return (jnp.sum(weights * nll), nll, correct), grads


def _backward(plan: HeadPlan, grads: tuple[jax.Array, jax.Array], cotangents: tuple) -> tuple:
    by_hidden, by_kernel = ((cotangents[0] * grad).astype(grad.dtype) if grad is not None else None for grad in grads)
    return by_hidden, by_kernel, None, None, None


head_loss.defvjp(_forward, _backward)


def _compute(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, scored: jax.Array, weights: jax.Array,
             plan: HeadPlan, gradients: bool) -> tuple:
    """(nll, correct, gradients or None) of global arrays."""
    local = functools.partial(_on_device, plan=plan, gradients=gradients)
    if plan.mesh is None or plan.mesh.size == 1:
        return local(hidden, kernel, targets, scored, weights)
    states = PartitionSpec(*plan.rows, None)
    grads = (states, plan.kernel if plan.kernel_gradient else None) if gradients else None
    # Not checked: inside, every sum over devices is written out, and nothing is differentiated through.
    return jax.shard_map(local, mesh=plan.mesh, in_specs=(states, plan.kernel, plan.rows, plan.rows, plan.rows),
                         out_specs=(plan.rows, plan.rows, grads), check_vma=False)(
                             hidden, kernel, targets, scored, weights)


def _on_device(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, scored: jax.Array, weights: jax.Array, *,
               plan: HeadPlan, gradients: bool) -> tuple:
    """`_compute` for one device's rows and its part of the kernel."""
    embed_axis = 1 - plan.vocab_axis
    parts = plan.mesh_axes(plan.kernel[embed_axis])
    others = tuple(axis for axis in plan.mesh_axes(*plan.rows) if axis not in parts)
    whole = kernel.astype(hidden.dtype)
    if parts:
        whole = lax.all_gather(whole, parts, axis=embed_axis, tiled=True)
    head = Head(whole, plan.vocab_axis, plan.mesh_axes(plan.kernel[plan.vocab_axis]))
    at = Positions(hidden.reshape(-1, hidden.shape[-1]), targets.ravel(), scored.ravel(), weights.ravel())

    def reduce(gradient: jax.Array) -> jax.Array:
        if parts:
            gradient = lax.psum_scatter(gradient, parts, scatter_dimension=embed_axis, tiled=True)
        return (lax.psum(gradient, others) if others else gradient).astype(kernel.dtype)

    trained = gradients and plan.kernel_gradient
    blocks = math.ceil(4 * whole.size / plan.max_gradient_bytes) if trained and parts else 1
    scores, grads = score(at, head, plan.chunk_size, by_hidden=gradients and blocks == 1,
                          by_kernel=trained and blocks == 1)
    if blocks > 1:
        block_size = math.ceil(whole.shape[plan.vocab_axis] / blocks)
        grads = gradients_by_block(at, head, scores.logsumexp, plan.chunk_size, block_size, reduce)
    elif gradients:
        grads = grads[0], reduce(grads[1]) if trained else None
    grads = (grads[0].reshape(hidden.shape), grads[1]) if gradients else None
    return scores.nll.reshape(targets.shape), scores.correct.reshape(targets.shape), grads

