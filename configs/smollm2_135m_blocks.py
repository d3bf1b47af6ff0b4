"""SmolLM2-135M-Instruct, adapted to generate one block of 4 tokens after another. Not published settings.

    dlm train --config=smollm2_135m_blocks --workdir=DIR --config.data.train=TEXT

Budget and optimizer are those of smollm2_135m; a step reads a noisy and a clean copy of each row. Clean tokens attend
causally, so that they compute what the parent computes, and blocks start at one token, which is the parent's own loss.
The parent teaches, and the clean copy keeps its AR loss: docs/results/objectives.md has what each brings.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("smollm2_135m")
    config.objective.name = "block_diffusion"
    config.objective.anneal_steps = 0
    config.objective.block_size = 4
    config.objective.block_size_schedule = ((0, 1), (100, 2), (300, 4))
    config.objective.clean_weight = 0.3
    config.objective.teacher.distribution_weight = 1.0
    config.objective.teacher.hidden_weight = 10.0
    return config
