"""Mixtures of experts in training: the load-balancing loss beside the objective's, and the routers' statistics."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from dlm_jax.diffusion import LossSums
from dlm_jax.models import ModelConfig
from dlm_jax.models.moe import RouterSums, load_balancing_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedSums:
    """The sums of a model's loss and of its routers; adds up over micro-batches. Only `loss` has a gradient.

    The balance of experts is that of a micro-batch of all devices, over all its positions; the loss of a step has the
    mean of its micro-batches, weighted by what they are normalized by.

    Attributes:
      loss: what is minimized, the load-balancing loss included.
      balance: the load-balancing loss over the experts per token, 1 where they are even, times the normalizer.
      normalizer_sum: of the micro-batches.
    """

    loss: jax.Array
    sums: LossSums
    router: RouterSums  # [layers, experts]
    balance: jax.Array
    normalizer_sum: jax.Array

    @classmethod
    def of(cls, sums: LossSums, router: RouterSums, config: ModelConfig, normalizer: jax.Array, *,
           trained: bool) -> Self:
        """Returns the sums of a micro-batch.

        Args:
          normalizer: what the loss of this micro-batch alone would be divided by.
          trained: whether the routers are trained; else their balance is measured and not minimized.
        """
        balance = load_balancing_loss(router, config.experts.num_experts_per_tok) * normalizer
        loss = sums.loss + config.experts.router_aux_loss_coef * balance if trained else sums.loss
        share = jax.lax.stop_gradient(balance) / config.experts.num_experts_per_tok
        return cls(loss, sums, jax.lax.stop_gradient(router), share, normalizer)

    @classmethod
    def zero(cls, config: ModelConfig) -> Self:
        """Returns the sums of no batch."""
        none = jnp.zeros((config.num_layers, config.experts.num_experts), jnp.float32)
        return cls(jnp.float32(0), LossSums.zero(), RouterSums(none, none), jnp.float32(0), jnp.float32(0))

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(jnp.add, self, other)

    def normalizer(self, name: str) -> jax.Array:
        """Returns `LossSums.normalizer`."""
        return self.sums.normalizer(name)

    def metrics(self) -> dict[str, jax.Array]:
        """Returns the routers' statistics.

        `router_balance` is 1 where all experts of each layer are used equally. `router_max_load` is the share of the
        most used expert of any layer, as a multiple of an even one; `router_unused` the share of experts without a
        token.
        """
        chosen = self.router.chosen
        even = jnp.mean(chosen, axis=-1, keepdims=True)
        return {"router_balance": self.balance / self.normalizer_sum,
                "router_max_load": jnp.max(chosen / even),
                "router_unused": jnp.mean((chosen == 0).astype(jnp.float32))}
