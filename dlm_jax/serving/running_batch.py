"""Rows that are sampled together, each of which joins and leaves between two steps (continuous batching).

A `RunningBatch` has a few slots or many, as the number of rows needs. Its rows have one padded length and one structure
of settings (`SamplerConfig.structure`), hence one compiled program for each of a few numbers of slots. Their
numbers, such as the temperature, may differ: see `sampling.spec.RowSettings`. A prompt is computed in chunks, between
steps of the other rows, before its row gets a slot.

A row's tokens do not depend on its slot, on the other rows, or on when they join, but for rounding: batches of other
sizes round differently, which in float32 hardly ever changes a token and in bfloat16 may.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.matmul import jit_model
from dlm_jax.parallel import num_batch_shards, shard_batch, to_host, use_mesh
from dlm_jax.random import example_keys
from dlm_jax.sampling.sampler import make_stepper
from dlm_jax.sampling.spec import Network, RowSettings, SamplingInputs, SamplingSpec, SamplingState, pending_mask

Rows = tuple[SamplingInputs, SamplingState]  # on the device
_CHUNKS = (32, 128)  # tokens of a prompt that are computed at a time
_GROWTH = 8  # from a number of slots to the next: more rows cost little, and each number needs a program
_SHRINK_AFTER = 8  # calls of `run` with fewer rows than need so many slots, until these are dropped


class Row(NamedTuple):
    """A row to fill.

    Attributes:
      tokens: int32 [width]; values in gaps and padding are ignored.
      fixed: bool [width], True where the token is given.
      length: later positions are padding.
      seed, example_index: determine the random numbers.
      settings: of one row, arrays [1].
      num_given: tokens before the first gap, which are computed first; 0 for models that compute entire rows.
    """

    tokens: np.ndarray
    fixed: np.ndarray
    length: int
    seed: int
    example_index: int
    settings: RowSettings
    num_given: int

    @property
    def chunk(self) -> int:
        """How many tokens of the prompt are computed at a time, the last chunk included."""
        return next((size for size in (0, *_CHUNKS) if self.num_given <= size), _CHUNKS[-1])

    @property
    def shape(self) -> tuple[int, int]:
        """What decides, with the structure of settings, which programs the row needs."""
        return len(self.tokens), self.chunk


class View(NamedTuple):
    """What the host sees of a row: arrays [width], the forward passes that it has had, and whether it is done."""

    tokens: np.ndarray
    masked: np.ndarray
    log_probs: np.ndarray
    steps: int
    is_done: bool


class Programs:
    """The compiled programs for one model and one structure of settings; they are freed with this object."""

    def __init__(self, network: Network, spec: SamplingSpec, max_rows: int, mesh: Mesh | None = None):
        self.spec, self.mesh = spec, mesh
        self.graphdef, self.params = nnx.split(network)
        self.shards = num_batch_shards(mesh)
        self.sizes = [self.shards]  # the numbers of slots
        while self.sizes[-1] < max_rows:
            self.sizes.append(min(_GROWTH * self.sizes[-1], -(-max_rows // self.shards) * self.shards))
        self._start = jit_model(_start, static_argnames=("graphdef", "spec"))
        self._prefill = jit_model(_prefill, static_argnames=("graphdef", "width", "spec"), donate_argnames=("state",))
        self._advance = jit_model(_advance, static_argnames=("graphdef", "spec"), donate_argnames=("state",))
        self._insert = jax.jit(_insert, donate_argnums=0)
        self._select = jax.jit(_select)

    @property
    def joins_midway(self) -> bool:
        """Whether a row can join others that have begun; a cache that grows stale is refreshed for all at once."""
        return self.spec.config.cache == "none"

    def start(self, rows: Sequence[Row]) -> Rows:
        """Returns rows whose prompts are to be computed, with empty rows up to a number that the mesh can split."""
        number = self.slots_for(len(rows))
        rows = [*rows, *[_empty_row(rows[0])] * (number - len(rows))]
        tokens, fixed = np.stack([row.tokens for row in rows]), np.stack([row.fixed for row in rows])
        lengths = np.array([row.length for row in rows], np.int32)
        seeds = np.array([[row.seed, row.example_index] for row in rows], np.uint32)
        settings = jax.tree.map(lambda *each: np.concatenate(each), *[row.settings for row in rows])
        arrays = (tokens, fixed, lengths, np.asarray(jax.random.key_data(_row_keys(seeds))), settings)
        if self.mesh is not None:
            arrays = jax.tree.map(lambda x: shard_batch(x, self.mesh), arrays)
        with use_mesh(self.mesh):
            return self._start(self.graphdef, self.params, *arrays, spec=self.spec)

    def prefill(self, rows: Rows, first: int, width: int) -> Rows:
        with use_mesh(self.mesh):
            state = self._prefill(self.graphdef, self.params, *rows, np.int32(first), width=width, spec=self.spec)
        return rows[0], state

    def advance(self, rows: Rows, num_steps: int, stop_early: bool) -> tuple[Rows, jax.Array]:
        with use_mesh(self.mesh):
            state, is_done = self._advance(self.graphdef, self.params, *rows, np.int32(num_steps), np.bool_(stop_early),
                                           spec=self.spec)
        return (rows[0], state), is_done

    def insert(self, rows: Rows, new: Rows, slots: np.ndarray) -> Rows:
        with use_mesh(self.mesh):
            return self._insert(rows, new, slots)

    def select(self, rows: Rows, index: np.ndarray, is_used: np.ndarray) -> Rows:
        with use_mesh(self.mesh):
            return self._select(rows, index, is_used)

    def empty(self, rows: Rows, keep: np.ndarray) -> Rows:
        """Returns rows of which those that are not in `keep`, bool [rows], need no steps: nothing of them is masked."""
        inputs, state = rows
        with use_mesh(self.mesh):
            return inputs, state._replace(masked=state.masked & keep[:, None])

    def compile(self, row: Row, slots: int) -> None:
        """Compiles what rows like this one need in so many slots, by running it on copies of the row."""
        if not self.joins_midway:
            jax.block_until_ready(self.advance(self.start([row] * slots), 1, False))
            return
        new, rows = self.start([row]), self.start([row])
        if row.chunk:
            rows = self.prefill(rows, 0, row.chunk)
        for size in self.sizes[: self.sizes.index(slots)]:  # from fewer slots, and back
            rows = self._resized(self._resized(rows, size), slots)
            self._resized(rows, size)
        rows = self.insert(rows, new, np.full(self.shards, slots, np.int32))  # nowhere
        jax.block_until_ready(self.advance(rows, 1, False))

    def _resized(self, rows: Rows, slots: int) -> Rows:
        return self.select(rows, np.zeros(slots, np.int32), np.ones(slots, bool))

    def slots_for(self, number: int) -> int:
        """Returns the slots for a number of rows."""
        return next(size for size in self.sizes if size >= number)


@dataclasses.dataclass
class _Joining:
    """Rows that start together, and how much of their prompts is computed; None is the owner of a removed one."""

    owners: list[Hashable | None]
    rows: Rows
    chunk: int
    num_given: int
    done: int = 0


class RunningBatch:
    """Rows of one width that are sampled together.

    Attributes:
      owners: the caller's object of the row in each slot; None where there is no row.
      time, step_seconds: of the caller: how long each row was computed, and how long a step takes by number of slots.
    """

    def __init__(self, programs: Programs):
        self.programs, self.time = programs, 0.0
        self.step_seconds: dict[int, float] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets all rows."""
        self.owners: list[Hashable | None] = []
        self._joining: list[_Joining] = []
        self._rows: Rows | None = None
        self._calls_with_few = 0

    @property
    def num_rows(self) -> int:
        """Rows that have a slot or will get one."""
        return len(self.all_owners())

    @property
    def num_running(self) -> int:
        """Rows that have a slot."""
        return sum(owner is not None for owner in self.owners)

    @property
    def is_open(self) -> bool:
        """Whether a row can join now."""
        return self.programs.joins_midway or self.num_rows == 0

    def add(self, rows: Sequence[Row], owners: Sequence[Hashable]) -> None:
        """Adds rows, which `prefill` gives a slot each."""
        num_given = max(row.num_given for row in rows)
        self._joining.append(_Joining(list(owners), self.programs.start(rows), rows[0].chunk, num_given))

    def prefill(self) -> None:
        """Computes the next chunk of a prompt; gives the rows slots where it was the last."""
        if not self._joining:
            return
        joining = self._joining[0]
        if joining.done < joining.num_given:
            joining.rows = self.programs.prefill(joining.rows, joining.done, joining.chunk)
            joining.done += joining.chunk
        if joining.done >= joining.num_given:
            self._joining.pop(0)
            self._insert(joining.rows, joining.owners)

    def _insert(self, new: Rows, owners: Sequence[Hashable | None]) -> None:
        """Puts rows into free slots, of which there are more if need be."""
        any_removed = any(owner is None for owner in owners)
        owners = [*owners, *[None] * (len(new[1].steps) - len(owners))]  # empty rows fill up what the mesh splits
        keep = np.array([owner is not None for owner in owners])
        if self.num_running == 0:
            self._rows, self.owners = self.programs.empty(new, keep) if any_removed else new, owners
            return
        if (total := self.programs.slots_for(self.num_running + int(keep.sum()))) > len(self.owners):
            self._resize(total)
        free = [slot for slot, owner in enumerate(self.owners) if owner is None]
        slots = np.full(len(owners), len(self.owners), np.int32)  # rows without an owner go nowhere
        slots[keep] = free[: keep.sum()]
        self._rows = self.programs.insert(self._rows, new, slots)
        for slot, owner in zip(slots.tolist(), owners, strict=True):
            if owner is not None:
                self.owners[slot] = owner

    def remove(self, owners: Sequence[Hashable]) -> None:
        """Frees the slots of rows, finished or not, and forgets those that have none yet."""
        def left(old: Sequence[Hashable | None]) -> list[Hashable | None]:
            return [None if owner in owners else owner for owner in old]

        for joining in self._joining:
            joining.owners = left(joining.owners)
        self._joining = [joining for joining in self._joining if any(owner is not None for owner in joining.owners)]
        self.owners = left(self.owners)
        if self.num_running == 0:
            self._rows, self.owners = None, []
        else:
            self._rows = self.programs.empty(self._rows, np.array([owner is not None for owner in self.owners]))

    def run(self, num_steps: int, stop_early: bool = False) -> dict[Hashable, View]:
        """Runs at most `num_steps` steps, fewer if all rows are done; returns what every row has then.

        Rows that are done leave.

        Args:
          stop_early: whether to return as soon as a row is done.
        """
        fewer = self.programs.slots_for(self.num_running)
        self._calls_with_few = self._calls_with_few + 1 if fewer < len(self.owners) else 0
        if self._calls_with_few > _SHRINK_AFTER and self.programs.joins_midway:
            self._resize(fewer)
        self._rows, is_done = self.programs.advance(self._rows, num_steps, stop_early)
        state = self._rows[1]
        # Copies: the next call overwrites the state.
        arrays = [np.array(to_host(x)) for x in (state.tokens, state.masked, state.confidence, state.steps, is_done)]
        views = {owner: View(*(x[slot] for x in arrays[:3]), int(arrays[3][slot]), bool(arrays[4][slot]))
                 for slot, owner in enumerate(self.owners) if owner is not None}
        if any(view.is_done for view in views.values()):  # their gaps are full: nothing has to be removed
            self.owners = [None if owner is None or views[owner].is_done else owner for owner in self.owners]
            if self.num_running == 0:
                self._rows, self.owners = None, []
        return views

    def all_owners(self) -> list[Hashable]:
        """Returns the owners of all rows, with and without slots."""
        groups = self.owners, *(joining.owners for joining in self._joining)
        return [owner for group in groups for owner in group if owner is not None]

    def _resize(self, slots: int) -> None:
        """Moves the rows that have owners to the front of a batch with so many slots."""
        kept = [slot for slot, owner in enumerate(self.owners) if owner is not None]
        index = np.zeros(slots, np.int32)
        index[: len(kept)] = kept
        self._rows = self.programs.select(self._rows, index, np.arange(slots) < len(kept))
        self.owners = [*(self.owners[slot] for slot in kept), *[None] * (slots - len(kept))]
        self._calls_with_few = 0


def row_width(length: int, max_length: int) -> int:
    """Returns the padded length of a row, a power of two from 64 on, or the model's limit."""
    return min(max(1 << (length - 1).bit_length(), 64), max_length)


def _empty_row(row: Row) -> Row:
    """Returns a row without gaps, of the same shapes."""
    return row._replace(fixed=np.ones_like(row.fixed))


@jax.jit
def _row_keys(seeds: jax.Array) -> jax.Array:
    """Returns the keys that `DiffusionLM.generate` uses, [batch], of uint32 (seed, example index) [batch, 2]."""
    return jax.vmap(lambda pair: example_keys(pair[0], pair[1:])[0])(seeds)


def _start(graphdef: Any, params: nnx.State, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array,
           key_data: jax.Array, settings: RowSettings, spec: SamplingSpec) -> Rows:
    inputs = SamplingInputs.of(spec, fixed, lengths, jax.random.wrap_key_data(key_data), settings)
    return inputs, make_stepper(nnx.merge(graphdef, params), spec).start(tokens, inputs)


def _prefill(graphdef: Any, params: nnx.State, inputs: SamplingInputs, state: SamplingState, first: jax.Array,
             width: int, spec: SamplingSpec) -> SamplingState:
    return make_stepper(nnx.merge(graphdef, params), spec).prefill(inputs, state, first, width)


def _advance(graphdef: Any, params: nnx.State, inputs: SamplingInputs, state: SamplingState, num_steps: jax.Array,
             stop_early: jax.Array, spec: SamplingSpec) -> tuple[SamplingState, jax.Array]:
    """Returns the state after the steps, and whether each row is done, bool [batch]."""
    stepper = make_stepper(nnx.merge(graphdef, params), spec)

    def is_done(state: SamplingState) -> jax.Array:
        return ~pending_mask(spec, inputs, state).any(axis=1)

    def goes_on(carry: tuple[jax.Array, SamplingState, jax.Array]) -> jax.Array:
        step, _, done = carry
        return (step < num_steps) & ~done.all() & ~(stop_early & (done.sum() > done_before.sum()))

    def take_step(carry: tuple[jax.Array, SamplingState, jax.Array]) -> tuple[jax.Array, SamplingState, jax.Array]:
        step, state, _ = carry
        state = stepper.advance(inputs, state)
        return step + 1, state, is_done(state)

    done_before = is_done(state)
    _, state, done = jax.lax.while_loop(goes_on, take_step, (jnp.int32(0), state, done_before))
    return state, done


def _insert(rows: Rows, new: Rows, slots: jax.Array) -> Rows:
    """Writes the rows of `new` to `slots` int32 [number]; past the end: dropped."""
    def write(axis: int, old: jax.Array, new: jax.Array) -> jax.Array:
        index = (slice(None),) * axis + (slots,)
        return old.at[index].set(new, mode="drop")

    return _map_rows(write, rows, new)


def _select(rows: Rows, index: jax.Array, is_used: jax.Array) -> Rows:
    """Returns the rows `index` int32 [slots]; those that are not `is_used`, bool [slots], have no gaps."""
    inputs, state = _map_rows(lambda axis, x: jnp.take(x, index, axis=axis), rows)
    return (inputs._replace(gaps=inputs.gaps & is_used[:, None]),
            state._replace(masked=state.masked & is_used[:, None]))


def _map_rows(function: Callable[..., jax.Array], *trees: Rows) -> Rows:
    """Maps `function(axis, *leaves)` over arrays, of which `axis` counts rows; scalars stay as in the first tree."""
    def visit(path: tuple, *leaves: jax.Array) -> jax.Array:
        in_cache = any(getattr(key, "name", None) in ("cache", "drafter_cache") for key in path)
        return leaves[0] if leaves[0].ndim == 0 else function(1 if in_cache else 0, *leaves)

    return jax.tree_util.tree_map_with_path(visit, *trees)
