"""Whether a model of ours, at the likeliest tokens, writes a given continuation: what lm-eval calls `is_greedy`."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from dlm_jax.diffusion import BlockSpec, DiffusionSpec
from dlm_jax.evaluation.eval_model import Greedy, Pair
from dlm_jax.models import Transformer
from dlm_jax.random import example_keys
from dlm_jax.sampling import GAP, SamplerConfig, SamplingSpec, sample_rows


def make_greedy(model: Transformer, *, autoregressive: bool, mask_token_id: int | None, bos_token_id: int | None = None,
                shift: bool = True, blocks: BlockSpec | None = None, batch_size: int = 16,
                mesh: Mesh | None = None) -> Greedy:
    """A `Greedy` by writing as many tokens as each continuation has, and comparing.

    From left to right the likeliest token is taken each time. A diffusion model begins with that many masks behind the
    context and reveals the token it is surest of, one a forward pass: so it is told how long the answer is, as in
    LLaDA's evaluation (arXiv 2502.09992). Nothing is drawn, so there is no seed, and an answer does not depend on the
    other pairs or the batch size.

    Args:
      bos_token_id: stands before every context; None: nothing does.
      batch_size: rows at a time.
      mesh: splits a batch over devices.

    Raises:
      DataError: a pair does not fit the model, or has neither BOS nor a context.
    """
    length = model.config.max_length
    config = (SamplerConfig(policy="autoregressive", temperature=0.0) if autoregressive
              else SamplerConfig(policy="confidence", temperature=0.0, num_steps=length))  # at most one a token
    spec = SamplingSpec(config, DiffusionSpec(mask_token_id, shift, blocks))
    head = [] if bos_token_id is None else [bos_token_id]

    def greedy(pairs: Sequence[Pair]) -> list[bool]:
        rows = [[*head, *pair.context, *[GAP] * len(pair.continuation)] for pair in pairs]
        keys = example_keys(0, jnp.zeros(len(rows), jnp.uint32))
        written = sample_rows(model, rows, keys, spec, batch_size=batch_size, mesh=mesh)
        return [tuple(row[len(row) - len(pair.continuation) :].tolist()) == tuple(pair.continuation)
                for row, pair in zip(written, pairs, strict=True)]

    return greedy
