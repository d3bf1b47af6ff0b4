"""Where a compiled program spends its time on a CPU, by the source lines or the named scopes of its instructions.

`train_step.py --profile=DIR` prints the seconds per step of each component, with separate columns for matrix products
and the rest and separate rows for forward and backward, and the rate of the products next to that of one large product
alone. `speculative.py --profile` prints the milliseconds of drafts, token choice and the rest of a pass.
"""

import pathlib
import re
import time
from collections import Counter
from collections.abc import Callable, Container, Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp

PARTS = {"layers.py": "blocks", "transformer.py": "the scan's slices and stacks, embedding",
         "xla.py": "attention", "random.py": "dropout", "fused_loss.py": "loss and head",
         "loss.py": "loss and head", "step.py": "AdamW"}
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


class Program:
    """The text of a compiled program, with what it says about its instructions."""

    def __init__(self, text: str):
        tables = {name: {int(i): rest for i, rest in re.findall(r"^(\d+) (.*)$", block, re.M)} for name, block in
                  re.findall(r"^(FileNames|FileLocations|StackFrames)\n((?:\d+ .*\n)+)", text, re.M)}
        self.files = {i: name.strip('"') for i, name in tables["FileNames"].items()}
        number = lambda key, line: int(re.search(rf"{key}=(\d+)", line)[1])  # noqa: E731
        self.locations = {i: number("file_name_id", line) for i, line in tables["FileLocations"].items()}
        self.frames = {i: (number("file_location_id", line), number("parent_frame_id", line) - 1)  # 1: none
                       for i, line in tables["StackFrames"].items()}
        self.lines = instructions(text)
        self.bodies = dict(re.findall(r"^%([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))

    def part(self, name: str) -> str:
        """Returns the component of the step that an instruction is from, by the innermost of our files on its stack."""
        line = self.lines.get(name, "")
        found = re.search(r"stack_frame_id=(\d+)", line)
        frame, part = int(found[1]) if found else 0, "zeros for what is stacked, rest"
        while frame in self.frames:
            location, parent = self.frames[frame]
            file = pathlib.PurePath(self.files[self.locations[location]])
            if "dlm_jax" in file.parts and file.name in PARTS:
                part = PARTS[file.name]
                break
            frame = parent
        return part + (", backward" if "transpose(jvp" in line else "")

    def flops(self, name: str) -> int:
        """Returns the FLOPs of the matrix products in an instruction."""
        line = self.lines.get(name, "")
        called = re.search(r"calls=%([\w.\-]+)", line)
        total = 0
        for dot in re.findall(r"= (.* dot\(.*)", self.bodies.get(called[1], "") if called else f"= {line}"):
            left = self.lines[re.search(r"dot\(%([\w.\-]+)", dot)[1]]
            sizes, count = dimensions(left), 2
            for size in [*dimensions(dot), *(sizes[int(i)] for i in
                                             re.search(r"lhs_contracting_dims=\{([\d,]+)\}", dot)[1].split(","))]:
                count *= size
            total += count
        return total


def instructions(text: str) -> dict[str, str]:
    """Returns what a program's text says of each instruction, by name."""
    return dict(re.findall(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*)$", text, re.M))


def dimensions(line: str) -> list[int]:
    return [int(size) for size in SHAPE.search(line)[1].split(",") if size]


def profile(run: Callable[[], None], compiled_text: str, folder: str, steps: int = 3) -> None:
    """Traces `steps` calls of `run` into `folder` and prints the table."""
    program = Program(compiled_text)
    events = trace(run, program.lines, folder, steps)
    seconds, flops = Counter(), Counter()
    kinds = {name: (program.part(name), program.flops(name) > 0) for _, _, name in events}
    for (part, product), spent in wall_time(events, kinds, lambda kind: kind[1]).items():
        seconds[part, product] += spent / steps
    for _, _, name in events:
        flops[program.part(name)] += program.flops(name) / steps
    total = sum(seconds.values())
    print("| part | products, s | GFLOP/s | other, s | share |\n| --- | --- | --- | --- | --- |")
    for part in sorted({part for part, _ in seconds}, key=lambda part: -seconds[part, True] - seconds[part, False]):
        products, other = seconds[part, True], seconds[part, False]
        rate = f"{flops[part] / products / 1e9:.0f}" if products > 0.01 else ""
        print(f"| {part} | {products:.2f} | {rate} | {other:.2f} | {(products + other) / total:.0%} |")
    products = sum(spent for (_, product), spent in seconds.items() if product)
    print(f"{total:.2f} s a step, {products:.2f} of them matrix products at {sum(flops.values()) / products / 1e9:.0f} "
          f"GFLOP/s; one product of 2048 x 2048 x 2048 runs at {best_rate() / 1e9:.0f} GFLOP/s")


def scope_seconds(run: Callable[[], None], compiled_text: str, folder: str, scopes: Sequence[str],
                  steps: int = 3) -> dict[str, float]:
    """Returns the seconds per call of `run` in each of the `jax.named_scope`s, the innermost, and in the rest."""
    lines = instructions(compiled_text)

    def scope(name: str) -> str:
        found = re.search(r'op_name="([^"]*)"', lines[name])
        return next((part for part in reversed(found[1].split("/") if found else []) if part in scopes), "rest")

    events = trace(run, lines, folder, steps)
    spent = wall_time(events, {name: scope(name) for _, _, name in events}, lambda _: True)
    return {part: spent[part] / steps for part in (*scopes, "rest")}


def trace(run: Callable[[], None], names: Container[str], folder: str, steps: int) -> list[tuple[float, float, str]]:
    """Traces `steps` calls of `run` into `folder`; returns start and end, in nanoseconds, of the instructions `names`.

    Loops and branches are left out: their bodies' instructions are there.
    """
    with jax.profiler.trace(folder):
        for _ in range(steps):
            run()
    path = max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return [(event.start_ns, event.end_ns, event.name)
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes for line in plane.lines
            for event in line.events if event.name in names and not re.match("while|cond|call", event.name)
            and "hlo_op" in dict(event.stats)]


def wall_time(events: Sequence[tuple[float, float, str]], kinds: Mapping[str, Hashable],
              runs_on: Callable[[Hashable], bool]) -> Counter:
    """Returns seconds by kind of instruction; those that run at the same time share that time.

    XLA's own threads return from some products immediately, and Eigen computes on: time without an instruction counts
    towards the one that started last and whose kind `runs_on`.
    """
    edges = sorted([(begin, 1, name) for begin, _, name in events] + [(end, -1, name) for _, end, name in events])
    running: Counter[str] = Counter()
    spent: Counter = Counter()
    before, latest = edges[0][0], None
    for moment, change, name in edges:
        active = +running
        for other, times in active.items():
            spent[kinds[other]] += (moment - before) * 1e-9 * times / active.total()
        if not active and latest is not None:
            spent[latest] += (moment - before) * 1e-9
        running[name] += change
        if change > 0 and runs_on(kinds[name]):
            latest = kinds[name]
        before = moment
    return spent


def best_rate() -> float:
    """Returns the floating-point operations per second of one large float32 product."""
    x = jnp.ones((2048, 2048))
    product = jax.jit(lambda x: x @ x)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds)
