"""Whether a model of ours, at the likeliest tokens, writes a given continuation: what lm-eval calls `is_greedy`."""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlm_jax.diffusion import example_keys
from dlm_jax.evaluation.candidate import Greedy, Pair
from dlm_jax.models import Transformer
from dlm_jax.parallel import array_sharding, batch_parts
from dlm_jax.sampling import GAP, SamplerConfig, Task, bucket, make_canvas, sample


def make_greedy(model: Transformer, *, autoregressive: bool, mask_token_id: int | None, bos_token_id: int | None = None,
                shift: bool = True, batch_size: int = 16, mesh: Mesh | None = None) -> Greedy:
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
    task = Task(config, mask_token_id, shift)
    head = [] if bos_token_id is None else [bos_token_id]

    def greedy(pairs: Sequence[Pair]) -> list[bool]:
        if not pairs:
            return []
        canvas = make_canvas([[*head, *pair.context, *[GAP] * len(pair.continuation)] for pair in pairs], length)
        parts = 1 if mesh is None else batch_parts(mesh)
        size = -(-batch_size // parts) * parts
        # Batch mates are alike in their width, one compiled shape, and in how many steps they take.
        order = sorted(range(len(pairs)), key=lambda i: (bucket(int(canvas.lengths[i]), length),
                                                         len(pairs[i].continuation)))
        found = [False] * len(pairs)
        for start in range(0, len(order), size):
            chosen = np.resize(order[start : start + size], size)  # the last batch repeats rows
            part = canvas.take(chosen)
            arrays = part.tokens, part.fixed, part.lengths, example_keys(0, jnp.zeros(size, jnp.uint32))
            if mesh is not None:
                arrays = jax.device_put(arrays, array_sharding(mesh, "batch"))
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                written = np.asarray(sample(model, *arrays, task).tokens)
            for i, row in zip(chosen, written, strict=True):
                end, wanted = canvas.lengths[i], pairs[i].continuation
                found[i] = tuple(row[end - len(wanted) : end].tolist()) == tuple(wanted)
        return found

    return greedy
