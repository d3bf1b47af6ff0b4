"""What libraries would say about themselves is not about the user's run, which has a sentence of its own."""

import logging
import os
import sys
import threading
import traceback
from types import TracebackType

_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "2", "TRANSFORMERS_VERBOSITY": "error",
                "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TOKENIZERS_PARALLELISM": "true"}


def keep_libraries_quiet() -> None:
    """To be called before they are imported."""
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    # A checkpoint that cannot be written fails in many threads at once, each with a trace. `CheckpointWriter` tells.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.excepthook, threading.excepthook = _tell, lambda failed: _tell(*failed[:3])


def _tell(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """The usual trace, but for what went wrong while Orbax was writing in the background."""
    files = {frame.filename for frame in traceback.extract_tb(trace)}
    writing = any("orbax" in file for file in files) and threading.current_thread() is not threading.main_thread()
    if not writing and str(error) != "Event loop is closed":  # this, tensorstore's late answers find
        sys.__excepthook__(kind, error, trace)
