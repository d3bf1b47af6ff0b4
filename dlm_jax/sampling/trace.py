"""What sampling looked like, step by step."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A batch after a step.

    Attributes:
      step: 0 before the first step.
      rows: int [batch], which of the texts asked for each row is.
      lengths: int [batch]; the rest of a row is padding.
      tokens: int [batch, length], the mask's id where masked.
      masked: bool [batch, length].
      confidence: float32 [batch, length], the log-probability of each token when it was drawn, 0 where given.
    """

    step: int
    rows: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    masked: np.ndarray
    confidence: np.ndarray
