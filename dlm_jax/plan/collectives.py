"""The collectives of a compiled program, read from its optimized HLO text: JAX reports their bytes nowhere else."""

import dataclasses
import math
import re
from collections import Counter

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|%[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of KINDS.
      group_size: devices that take part together; slices if it is between slices.
      size: bytes of the full array on a device: the output of a gather, the input of a scatter.
      count: executions per step; the trips of loops are multiplied in.
      is_bounded: False in a loop whose trip count depends on the data, which is counted once.
      between_slices: whether it uses the network between slices.
    """

    kind: str
    group_size: int
    size: int
    count: int
    is_bounded: bool = True
    between_slices: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a device sends per step by the ring algorithms that move the least (Thakur et al., 2005, IJHPCA
        19): (n - 1) / n of the full array for a gather, scatter or exchange, twice that for an all-reduce."""
        share = (self.group_size - 1) / self.group_size
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(self.kind, share)
        return self.count * self.size * factor

    @property
    def label(self) -> str:
        """The kind, with what sets it apart in a table."""
        return (self.kind + " between slices" * self.between_slices
                + " in loops of unknown length, counted once" * (not self.is_bounded))


def collectives(hlo: str, num_devices: int, num_slices: int = 1) -> list[Collective]:
    """Returns the collectives of a program.

    Args:
      hlo: its optimized HLO, `compiled.as_text()`.
      num_devices: devices that it runs on.
      num_slices: TPU slices that these devices belong to.
    """
    computations, entry = _parse(hlo)
    runs, unbounded, fused = Counter(), set(), set()

    def visit(name: str, times: int, is_bounded: bool) -> None:
        runs[name] += times
        if not is_bounded:
            unbounded.add(name)
        for instruction in computations[name].values():
            if instruction.opcode == "while":
                trips = _trip_count(instruction, computations[name], computations)
                visit(instruction.attribute("body"), times * (trips or 1), is_bounded and trips is not None)
            for callee in instruction.called():
                if callee in computations:
                    if instruction.opcode == "fusion":
                        fused.add(callee)
                    visit(callee, times, is_bounded)

    visit(entry, 1, True)
    found: dict[str, Collective] = {}
    for name, times in runs.items():
        for instruction in computations[name].values():
            one = _collective(instruction, num_devices, num_slices)
            if one is None:
                continue
            one = dataclasses.replace(one, count=times, is_bounded=name not in unbounded)
            # A TPU scatters by a fusion that reduces and keeps a slice of the result.
            if name in fused and one.kind == "all-reduce" and any(
                    i.opcode == "dynamic-slice" and i.operands()[0] == instruction.name
                    for i in computations[name].values()):
                one = dataclasses.replace(one, kind="reduce-scatter")
            # TPUs spread one collective over several fusions, some within unrelated loops. The copies share a channel;
            # the rarest of them, the start or the end, has the true count.
            channel = re.search(r"channel_id=(\d+)", instruction.text) if name in fused else None
            key = f"channel {channel[1]}" if channel else instruction.name
            found[key] = min(found.get(key, one), one, key=lambda c: c.count)
    return list(found.values())


def by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Returns `{label: {"count": per step, "bytes": sent by a device per step}}` for the kinds that occur."""
    sums: dict[str, dict[str, float]] = {}
    for one in sorted(found, key=lambda c: (c.between_slices, KINDS.index(c.kind))):
        kind = sums.setdefault(one.label, {"count": 0, "bytes": 0})
        kind["count"] += one.count
        kind["bytes"] += round(one.sent)
    return sums


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    text: str  # operands and attributes

    def array_bytes(self) -> list[int]:
        """Returns the bytes of each array of the result."""
        return [math.prod(int(size) for size in dims.split(",") if size)
                * (8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))) // 8
                for dtype, dims in _ARRAY.findall(self.shape)]

    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.text.partition("), ")[0])

    def constant(self) -> int:
        return int(re.match(r"-?\d+", self.text)[0])

    def attribute(self, name: str) -> str:
        return re.search(rf"\b{name}=%?([\w.-]+)", self.text)[1]

    def called(self) -> list[str]:
        """Returns the computations that it runs once: not the body of a loop."""
        return [name for names in _CALLED.findall(self.text) for name in re.findall(r"%([\w.-]+)", names)]


_Computation = dict[str, _Instruction]


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    """Returns (instructions by name, by computation; the name of the entry computation)."""
    computations, entry, current = {}, "", {}
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            current[match[1]] = _Instruction(*match.groups())
    return computations, entry


def _trip_count(loop: _Instruction, parent: _Computation, computations: dict[str, _Computation]) -> int | None:
    """Returns how often a loop runs: as XLA annotates it, or by a condition `counter < constant` in steps of one."""
    if known := re.search(r'known_trip_count[\\"]*:\s*\{[\\"]*n[\\"]*:[\\"]*(\d+)', loop.text):
        return int(known[1])
    condition = computations[loop.attribute("condition")]
    compare = next((i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.text), None)
    counter, limit = (condition.get(name) for name in compare.operands()) if compare else (None, None)
    if not limit or limit.opcode != "constant" or not counter or counter.opcode != "get-tuple-element":
        return None
    # The counter's start is a constant, by way of copies, in the tuple that the loop carries; otherwise 0, as in JAX.
    carried, index = parent.get(loop.operands()[0]), int(re.search(r"index=(\d+)", counter.text)[1])
    start = parent.get(carried.operands()[index]) if carried and carried.opcode == "tuple" else None
    while start and start.opcode in ("copy", "bitcast"):
        start = parent.get(start.operands()[0])
    return limit.constant() - (start.constant() if start and start.opcode == "constant" else 0)


def _collective(instruction: _Instruction, num_devices: int, num_slices: int) -> Collective | None:
    """Returns one execution of a collective; None for another instruction."""
    # Between slices a collective is a transfer by way of the host.
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
    if instruction.opcode == "send" and transfer:
        kind = transfer[1].lower().replace("_", "-")
        return Collective(kind if kind in KINDS else "collective-permute", num_slices, instruction.array_bytes()[0], 1,
                          between_slices=True)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    group_size, arrays = _group_size(instruction.text, num_devices), instruction.array_bytes()
    size = sum(arrays)
    if instruction.opcode == "collective-permute-start":  # (input, output, contexts)
        size = arrays[0]
    elif instruction.opcode == "all-gather-start":  # (inputs, outputs), the outputs group_size times the inputs
        size = size * group_size // (group_size + 1)
    elif kind == "reduce-scatter":
        size *= group_size
    return Collective(kind, group_size, size, 1)


def _group_size(text: str, num_devices: int) -> int:
    """Returns the devices of a replica group, in any of the notations of XLA."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # 'axis', or a factor of it: 'axis':(1)2
        return math.prod(int(factor or sizes[axis]) for axis, factor in axes)
    return num_devices
