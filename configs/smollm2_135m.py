"""SmolLM2-135M-Instruct on one machine of 2 to 8 cores, or one GPU: 2 million tokens. Not published settings.

    dlm train --config=smollm2_135m --workdir=DIR --config.data.train=TEXT

The source may be a file: --config.model.source=SmolLM2-135M-Instruct.Q8_0.gguf. The budget is for cores that multiply
in bfloat16, which take hours for it; on a GPU set --config.num_steps=50000. The mask is a token that the vocabulary has
and the model did not learn: its row equals those of ten other such tokens. smollm2_135m_blocks generates block by
block, smollm2_135m_lora trains fewer parameters.
"""

from dlm_jax.cli.config import train_defaults


def get_config():
    config = train_defaults()
    config.num_steps = 2_000

    config.model.source = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.model.default_mask_token = "<empty_output>"  # id 16; the vocabulary stays a multiple of 128
    config.model.dtype = "auto"

    config.data.length = 128
    config.data.batch_size = 8

    config.objective.anneal_steps = 500

    config.optimizer.learning_rate = 1.5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.99  # few tokens per step

    config.validation.every = 200
    config.validation.num_rows = 64
    config.checkpoint.every = 500
    config.log.every = 20
    return config
