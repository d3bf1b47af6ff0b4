"""The errors that reach a user: one sentence that names what is wrong, where, and what to do."""


class DLMError(Exception):
    """Base of every error dlm_jax raises on purpose; the command line prints its message without a trace."""


class ConfigError(DLMError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class CheckpointError(DLMError):
    """A checkpoint is missing, unreadable, or does not fit the model."""


class DataError(DLMError):
    """A corpus, tokenizer or batch is missing, empty, corrupt, or does not fit the model."""


class TrainingError(DLMError):
    """Training cannot go on, for instance because the loss is not a number."""
