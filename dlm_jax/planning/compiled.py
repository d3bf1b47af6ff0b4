"""What the compiler says of a program: that it fits and what it needs, or that it does not fit."""

import dataclasses
import re
import time

import jax

from dlm_jax.errors import DLMError
from dlm_jax.parallel.chips import GIB

# As libtpu words it, in one of two ways; and the size of the HBM with it.
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm|"
                   r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class CompileError(DLMError):
    """A program cannot be compiled, for another reason than its memory."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """GiB of a chip.

    Attributes:
      needed: at the fullest moment, the arguments included; of a program that does not fit, what the compiler says it
        would need.
      limit: what the compiler grants.
      arguments: state and batch. None, as `temporary` is, of a program that does not fit.
      temporary: what lives during a step, all of it together; more than what is needed at any one moment.
    """

    needed: float
    limit: float | None
    fits: bool
    arguments: float | None = None
    temporary: float | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that was compiled.

    Attributes:
      hlo: its optimised text; None where it does not fit.
    """

    memory: Memory
    hlo: str | None
    seconds: float


def compile_step(traced: jax.stages.Traced, limit: float) -> Compiled:
    """Lowers and compiles; a program that needs more than the chip has is an answer, not an error.

    Args:
      limit: GiB of the chip, as far as known beforehand.

    Raises:
      CompileError: the compiler fails otherwise.
    """
    began = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        memory = exhausted(str(error))
        if memory is None:
            raise CompileError(f"the step cannot be compiled: {' '.join(str(error).split())[:600]}") from error
        return Compiled(memory, None, time.perf_counter() - began)
    analysis = compiled.memory_analysis()
    memory = Memory(analysis.peak_memory_in_bytes / GIB, limit, True, analysis.argument_size_in_bytes / GIB,
                    analysis.temp_size_in_bytes / GIB)
    return Compiled(memory, compiled.as_text(), time.perf_counter() - began)


def exhausted(message: str) -> Memory | None:
    """What a compiler's refusal says of memory; None where it refused something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    match = _USED.search(message)
    if not match:
        return None
    used, used_unit, limit, limit_unit = match.groups()[:4] if match[1] else match.groups()[4:]
    return Memory(float(used) * _UNITS[used_unit] / GIB, float(limit) * _UNITS[limit_unit] / GIB, False)
