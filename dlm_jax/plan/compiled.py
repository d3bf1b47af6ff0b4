"""What the compiler says of a program: that it fits and what it needs, or that it does not fit."""

import dataclasses
import re
import time
from collections.abc import Sequence

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
      host: what lies in the memory of the chip's host.
    """

    needed: float
    limit: float | None
    fits: bool
    arguments: float | None = None
    temporary: float | None = None
    host: float = 0.0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step that was compiled.

    Attributes:
      hlo: the optimised text of its programs; none where one of them does not fit.
    """

    memory: Memory
    hlo: tuple[str, ...]
    seconds: float


def compile_step(programs: Sequence[jax.stages.Traced], limit: float, beside: float = 0.0) -> Compiled:
    """Compiles the programs of a step, which run one after another: they fit if each of them does.

    Args:
      limit: GiB of the chip, as far as known beforehand.
      beside: GiB of the chip that are taken while the first program runs, and are not among its arguments.

    Raises:
      CompileError: the compiler fails, for another reason than memory.
    """
    began, memories, texts = time.perf_counter(), [], []
    for program in programs:
        memory, hlo = _compile(program, limit)
        if program is programs[0]:
            needed = memory.needed + beside
            memory = dataclasses.replace(memory, needed=needed, fits=memory.fits and needed <= limit)
        if not memory.fits:
            return Compiled(memory, (), time.perf_counter() - began)
        memories.append(memory)
        texts.append(hlo)
    largest = {name: max(getattr(memory, name) for memory in memories)
               for name in ("needed", "arguments", "temporary", "host")}
    return Compiled(Memory(limit=limit, fits=True, **largest), tuple(texts), time.perf_counter() - began)


def _compile(traced: jax.stages.Traced, limit: float) -> tuple[Memory, str | None]:
    """What a program needs, and its optimised text where it fits."""
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        memory = exhausted(str(error))
        if memory is None:
            raise CompileError(f"the step cannot be compiled: {' '.join(str(error).split())[:600]}") from error
        return memory, None
    analysis = compiled.memory_analysis()
    host = analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes  # which the peak counts in
    memory = Memory((analysis.peak_memory_in_bytes - host) / GIB, limit, True, analysis.argument_size_in_bytes / GIB,
                    analysis.temp_size_in_bytes / GIB, host / GIB)
    return memory, compiled.as_text()


def exhausted(message: str) -> Memory | None:
    """What a compiler's refusal says of memory; None where it refused something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    match = _USED.search(message)
    if not match:
        return None
    used, used_unit, limit, limit_unit = match.groups()[:4] if match[1] else match.groups()[4:]
    return Memory(float(used) * _UNITS[used_unit] / GIB, float(limit) * _UNITS[limit_unit] / GIB, False)
