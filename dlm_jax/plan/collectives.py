"""What a compiled program sends between devices, read from its optimised HLO text."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|true_computation|false_computation|branch_computations|called_computations)="
                     r"(\{[^}]*\}|%[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: of KINDS.
      group_size: devices that take part together, or slices where it is between slices.
      size: bytes of the whole array on a device: what gathering gives, what scattering takes.
      count: how often a step does it; those in a loop count for every trip.
      is_bounded: False in a loop whose trips depend on the data; it is then counted for one trip.
      between_slices: whether it goes over the network between slices.
    """

    kind: str
    group_size: int
    size: int
    count: int
    is_bounded: bool = True
    between_slices: bool = False

    @property
    def sent(self) -> float:
        """Bytes a device sends in a step, by the ring algorithms that move the least (Thakur et al., 2005, IJHPCA 19):
        (n - 1) / n of the whole array for gathering, scattering and exchanging, twice that for reducing to all."""
        share = (self.group_size - 1) / self.group_size
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(self.kind, share)
        return self.count * self.size * factor


def collectives(hlo: str, num_devices: int, num_slices: int = 1) -> list[Collective]:
    """The collectives of a program.

    Args:
      hlo: the text of its optimised HLO, `compiled.as_text()`.
      num_devices: that it runs on.
      num_slices: TPU slices that they lie in.
    """
    program, found = _Program(hlo), {}
    for computation, times in program.executions().items():
        fused = computation in program.fused
        for instruction in program.computations[computation]:
            collective = _collective(instruction, num_devices, *times) or _transfer(instruction, num_slices, *times)
            if collective is None:
                continue
            if fused and collective.kind == "all-reduce" and program.keeps_a_part(computation, instruction):
                collective = dataclasses.replace(collective, kind="reduce-scatter")
            # TPUs spread one over several fusions, each with a copy of it, some of them within loops that it does
            # not belong to: the copies share a channel, and the rarest of them, the start or the end, says how often.
            channel = re.search(r"channel_id=(\d+)", instruction.text) if fused else None
            key = f"channel {channel[1]}" if channel else instruction.name
            known = found.get(key)
            found[key] = collective if known is None or collective.count < known.count else known
    return list(found.values())


def by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    """`{kind: {"count": a step, "bytes": that a device sends in a step}}` for the kinds there are."""
    sums = {kind + suffix: [c for c in found if c.kind == kind and c.between_slices == bool(suffix)]
            for suffix in ("", " between slices") for kind in KINDS}
    return {kind: {"count": sum(c.count for c in some), "bytes": round(sum(c.sent for c in some))}
            for kind, some in sums.items() if some}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    text: str  # operands and attributes

    @classmethod
    def read(cls, line: str) -> "_Instruction | None":
        match = _INSTRUCTION.match(line)
        if not match:
            return None
        name, rest = match.groups()
        end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
        opcode, _, text = rest[end:].strip().partition("(")
        return cls(name, rest[:end], opcode, text)

    def arrays(self) -> list[int]:
        """Bytes of each array of the result."""
        return [_bytes(*match.groups()) for match in _ARRAY.finditer(self.shape)]

    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.text[:_closing("(" + self.text)])

    def attribute(self, name: str) -> str | None:
        match = re.search(rf"\b{name}=%([\w.-]+)", self.text)
        return match and match[1]

    def called(self) -> list[str]:
        """The computations it runs once, loops apart."""
        return [name for _, names in _CALLED.findall(self.text) for name in re.findall(r"%([\w.-]+)", names)]


class _Program:
    """Computations by name, and how often each runs."""

    def __init__(self, hlo: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry, current = "", []
        for line in hlo.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations[match[2]] = []
                self.entry = match[2] if match[1] else self.entry
            elif instruction := _Instruction.read(line):
                current.append(instruction)

    @functools.cached_property
    def fused(self) -> set[str]:
        """The computations that are fusions."""
        return {callee for body in self.computations.values() for i in body if i.opcode == "fusion"
                for callee in i.called()}

    def keeps_a_part(self, fusion: str, reduction: _Instruction) -> bool:
        """Whether a fusion reduces and takes its own part at once, which is how TPUs scatter."""
        return any(i.opcode == "dynamic-slice" and i.operands()[0] == reduction.name for i in self.computations[fusion])

    def executions(self) -> dict[str, tuple[int, bool]]:
        """(times a run of the program, whether all loops around it have a known number of trips) of what runs."""
        times: dict[str, int] = defaultdict(int, {self.entry: 1})
        bounded: dict[str, bool] = defaultdict(lambda: True)
        for name in reversed(list(self._callees_first(self.entry, set()))):
            for callee, trips in self._calls(name):
                times[callee] += times[name] * (trips or 1)
                bounded[callee] &= bounded[name] and trips is not None
        return {name: (count, bounded[name]) for name, count in times.items()}

    def _callees_first(self, name: str, seen: set[str]) -> Iterator[str]:
        seen.add(name)
        for callee, _ in self._calls(name):
            if callee not in seen:
                yield from self._callees_first(callee, seen)
        yield name

    def _calls(self, name: str) -> Iterator[tuple[str, int | None]]:
        """(computation, trips) for each that this one runs; None for a loop whose trips are not known."""
        for instruction in self.computations[name]:
            if instruction.opcode == "while":
                yield instruction.attribute("body"), self._trips(name, instruction)
            for callee in instruction.called():
                if callee in self.computations:
                    yield callee, 1

    def _trips(self, parent: str, loop: _Instruction) -> int | None:
        """How often a loop runs: as XLA notes it, or by a condition `counter < constant`, which counts by ones."""
        if noted := re.search(r'known_trip_count[\\"]*:\s*\{[\\"]*n[\\"]*:[\\"]*(\d+)', loop.text):
            return int(noted[1])
        condition = {i.name: i for i in self.computations[loop.attribute("condition")]}
        compare = next((i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.text), None)
        if compare is None:
            return None
        counter, limit = (condition.get(name) for name in compare.operands())
        if limit is None or limit.opcode != "constant" or counter is None or counter.opcode != "get-tuple-element":
            return None
        index = int(re.search(r"index=(\d+)", counter.text)[1])
        return _constant(limit) - self._start(parent, loop.operands()[0], index)

    def _start(self, parent: str, tuple_name: str, index: int) -> int:
        """The constant from which a loop counts; 0, as JAX's loops do, where it is not to be seen."""
        known = {i.name: i for i in self.computations[parent]}
        carried = known.get(tuple_name)
        operands = carried.operands() if carried and carried.opcode == "tuple" else []
        first = known.get(operands[index]) if index < len(operands) else None
        while first is not None and first.opcode in ("copy", "bitcast"):
            first = known.get(first.operands()[0])
        return _constant(first) if first is not None and first.opcode == "constant" else 0


def _collective(instruction: _Instruction, num_devices: int, count: int, is_bounded: bool) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    size, arrays = _group_size(instruction.text, num_devices), instruction.arrays()
    total = sum(arrays)
    if instruction.opcode == "collective-permute-start":  # (input, output, contexts)
        total = arrays[0]
    elif instruction.opcode == "all-gather-start":  # (inputs, outputs), these as large as all inputs together
        total = total * size // (size + 1)
    elif kind == "reduce-scatter":
        total *= size
    return Collective(kind, size, total, count, is_bounded)


def _transfer(instruction: _Instruction, num_slices: int, count: int, is_bounded: bool) -> Collective | None:
    """A collective between slices, which stands in the program as a transfer by way of the host."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
    if instruction.opcode != "send" or not kind:
        return None
    name = kind[1].lower().replace("_", "-")
    return Collective(name if name in KINDS else "collective-permute", num_slices, instruction.arrays()[0], count,
                      is_bounded, between_slices=True)


def _group_size(text: str, num_devices: int) -> int:
    """Devices in a replica group, in any of the forms in which XLA prints groups."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # 'axis', or a part of it: 'axis':(1)2
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return num_devices


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8


def _constant(instruction: _Instruction) -> int:
    return int(re.match(r"-?\d+", instruction.text)[0])


def _closing(text: str) -> int:
    """Where the bracket that opens `text` closes."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(text)
