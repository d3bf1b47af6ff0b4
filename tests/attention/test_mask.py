import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.attention.mask import MaskSpec, Span
from dlm_jax.errors import ConfigError
from dlm_jax.random import annealing_seed, counter_hash, dropout, dropout_seeds

N = 256
SEED, STEPS, EXAMPLES = 17, 4, 4  # for the statistics: consecutive steps and examples, as in a run
RATIOS = [0.01, 0.1, 0.3, 0.5, 0.9, 0.99]


allowed_of = jax.jit(AttentionMask.allowed)


def square(mask: AttentionMask, n: int = N) -> np.ndarray:
    return np.asarray(allowed_of(mask, jnp.arange(n), jnp.arange(n)))


@functools.cache
def annealed_bits(ratio: float) -> np.ndarray:
    """Returns which later keys annealing opens: bool [STEPS, EXAMPLES, N queries, N keys]."""
    masks = [AttentionMask.annealed(ratio, annealing_seed(SEED, 1000 + step), jnp.arange(EXAMPLES))
             for step in range(STEPS)]
    return np.stack([allowed_of(mask, jnp.arange(N), jnp.arange(N, 2 * N)) for mask in masks])


def standardized(bits: np.ndarray, ratio: float) -> np.ndarray:
    """Scales bits that are true with probability `ratio` to mean 0 and variance 1."""
    return (bits - ratio) / np.sqrt(ratio * (1 - ratio))


def test_causal_and_bidirectional():
    np.testing.assert_array_equal(square(AttentionMask.causal())[0], np.tril(np.ones((N, N), bool)))
    assert square(AttentionMask.bidirectional()).all()


def test_annealing_ends_are_exact():
    for seed in range(4):
        np.testing.assert_array_equal(square(AttentionMask.annealed(0.0, seed)), square(AttentionMask.causal()))
        assert square(AttentionMask.annealed(1.0, seed)).all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_annealing_density(ratio):
    deviations = standardized(annealed_bits(ratio), ratio)
    assert abs(deviations.mean()) * np.sqrt(deviations.size) < 5
    for axes in ((2, 3), (0, 1, 2), (0, 1, 3)):  # the same per square, per key and per query
        sums = deviations.sum(axes) / np.sqrt(deviations.size / deviations.sum(axes).size)
        assert abs(sums).max() < 5
        # The counts have the variance of a binomial distribution.
        assert abs(np.mean(sums**2) - 1) < 5 * np.sqrt(2 / sums.size)


def test_annealing_opens_monotonically():
    squares = [square(AttentionMask.annealed(ratio, 7))[0] for ratio in [0.0, *RATIOS, 1.0]]
    for few, more in itertools.pairwise(squares):
        assert (more >= few).all() and (more != few).any()


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_annealing_is_independent_of_its_neighbors(ratio):
    """Along steps, examples, rows, columns, and every diagonal of two to four of them."""
    bits = standardized(annealed_bits(ratio), ratio)
    directions = [d for d in itertools.product((-1, 0, 1), repeat=4) if d > (0, 0, 0, 0)]  # one of each pair d, -d
    assert len(directions) == 40
    for direction in directions:
        here = tuple(slice(max(0, -d), n - max(0, d)) for d, n in zip(direction, bits.shape, strict=True))
        there = tuple(slice(max(0, d), n - max(0, -d)) for d, n in zip(direction, bits.shape, strict=True))
        product = bits[here] * bits[there]
        assert abs(product.mean()) * np.sqrt(product.size) < 5, direction


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1)], ids=str)
def test_annealing_patterns_of_four_cells(ratio, shape):
    rows, columns = shape
    bits = annealed_bits(ratio).reshape(-1, N // rows, rows, N // columns, columns)
    patterns = bits.swapaxes(2, 3).reshape(-1, 4) @ (1 << np.arange(4))
    found = np.bincount(patterns, minlength=16)
    trues = np.array([number.bit_count() for number in range(16)])
    expected = len(patterns) * ratio**trues * (1 - ratio) ** (4 - trues)
    chi_square = np.sum((found - expected) ** 2 / expected)  # of 15 degrees of freedom: mean 15, variance 30
    assert abs(chi_square - 15) < 5 * np.sqrt(30)


def test_annealing_is_independent_of_dropout():
    bits = standardized(annealed_bits(0.5), 0.5)
    seeds = dropout_seeds(SEED, jnp.arange(EXAMPLES))
    for layer in range(2):
        ones = jnp.ones((EXAMPLES, 1, 2, N, 2 * N))  # as in xla_attention: [batch, kv_heads, groups, Q, K]
        dropped = np.asarray(dropout(ones, 0.5, counter_hash(seeds, layer, 0)))[:, 0, :, :, N:] == 0
        product = bits[:, :, None] * standardized(dropped, 0.5)  # [step, example, group, Q, K]
        deviations = product.sum((1, 3, 4)) / np.sqrt(EXAMPLES * N * N)
        assert abs(deviations).max() < 5


def test_tile_is_a_slice_of_the_square():
    segments = jnp.asarray(np.repeat(np.arange(8), N // 8)[None].repeat(2, 0))
    mask = AttentionMask.annealed(0.4, 11, jnp.array([5, 9])).with_segments(segments).with_lengths(
        jnp.array([N, 100])).with_window(90)
    tile = mask.allowed(jnp.arange(64, 128), jnp.arange(32, 160))
    np.testing.assert_array_equal(tile, square(mask)[:, 64:128, 32:160])


def test_annealing_depends_on_the_example_not_its_row():
    both = square(AttentionMask.annealed(0.5, 1, jnp.array([8, 21])))
    alone = square(AttentionMask.annealed(0.5, 1, jnp.array([21])))
    np.testing.assert_array_equal(both[1], alone[0])
    assert (both[0] != both[1]).any()


def test_narrowing():
    n = 6
    i, j = np.indices((n, n))
    segments = np.array([[0, 0, 1, 1, 1, 2]])
    both = AttentionMask.bidirectional()
    np.testing.assert_array_equal(square(both.with_window(2), n)[0], abs(i - j) < 2)
    np.testing.assert_array_equal(square(both.with_lengths(jnp.array([4])), n)[0], j < 4)
    np.testing.assert_array_equal(square(both.with_segments(segments), n)[0], segments[0][i] == segments[0][j])
    np.testing.assert_array_equal(square(AttentionMask.block_causal(2), n)[0], j // 2 <= i // 2)
    branches = np.array([[0, 0, 1, 1, 2, 0]])  # of segments 0 0 0 0 0 1
    ancestors = [{0}, {0, 1}, {0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 4}, {5}]
    seen = square(AttentionMask.causal().with_branches(np.array([[0] * 5 + [1]]), branches), n)[0]
    np.testing.assert_array_equal(seen, [[key in ancestors[query] and key <= query for key in range(n)]
                                         for query in range(n)])
    matrix = np.random.default_rng(0).random((n, n)) < 0.5
    np.testing.assert_array_equal(square(AttentionMask.matrix(matrix), n)[0], matrix)
    np.testing.assert_array_equal(
        AttentionMask.matrix(matrix).allowed(jnp.array([3, 1]), jnp.array([0, 5]))[0], matrix[[3, 1]][:, [0, 5]])


def test_ratio_and_seed_may_be_traced():
    allowed = jax.jit(lambda r, s: AttentionMask.annealed(r, s).allowed(jnp.arange(N), jnp.arange(N)))
    np.testing.assert_array_equal(allowed(0.3, 5), square(AttentionMask.annealed(0.3, 5)))


@pytest.mark.parametrize("bidirectional_clean", [False, True])
@pytest.mark.parametrize("causal_blocks", [False, True])
@pytest.mark.parametrize("size, views", [(1, 1), (4, 2), (9, 1), (20, 2)])
def test_block_diffusion(size, views, bidirectional_clean, causal_blocks):
    n = 9
    mask = AttentionMask.block_diffusion(size, n, views, bidirectional_clean=bidirectional_clean,
                                         causal_blocks=causal_blocks)
    (q_copy, k_copy), (q, k) = np.divmod(np.indices([n * (views + 1)] * 2), n)
    of_clean = k // size <= q // size if bidirectional_clean else k <= q
    own_block = (q_copy == k_copy) & (q // size == k // size) & ((k <= q) | (not causal_blocks))
    expected = np.where(k_copy < views, own_block, np.where(q_copy == views, of_clean, k // size < q // size))
    np.testing.assert_array_equal(square(mask, n * (views + 1))[0], expected)


def test_window_of_block_diffusion_is_within_the_text():
    n = 8
    wide, narrow = (square(AttentionMask.block_diffusion(4, n).with_window(w), 2 * n)[0] for w in (None, 3))
    at = np.arange(2 * n) % n
    np.testing.assert_array_equal(narrow, wide & (abs(at[:, None] - at) < 3))
    with pytest.raises(ConfigError, match="block_diffusion"):
        AttentionMask.block_diffusion(4, n).with_lengths(jnp.array([3]))


@pytest.mark.parametrize("spec", [
    MaskSpec("causal"), MaskSpec("bidirectional", lengths=True), MaskSpec("annealed"),
    MaskSpec("block_causal", block_size=6), MaskSpec("causal", window=20), MaskSpec("bidirectional", segments=True),
    MaskSpec("causal", segments=True, branches=True),
    MaskSpec("block_diffusion", block_size=12, text_length=32, views=1),
    MaskSpec("block_diffusion", block_size=9, window=28, text_length=28, views=1),
    MaskSpec("block_diffusion", block_size=12, text_length=28, views=1, causal_blocks=True),
    MaskSpec("block_diffusion", block_size=9, text_length=28, views=1, bidirectional_clean=True),
    MaskSpec("block_diffusion", block_size=9, lengths=True, text_length=28, views=1, bidirectional_clean=True),
], ids=str)
def test_tile_coverage_bounds_the_rule(spec):
    rng = np.random.default_rng(0)
    segments, corners = jnp.asarray(np.sort(rng.integers(0, 5, 64))), rng.integers(0, 56, (120, 2))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def tile(corner, ratio):
        params = AttentionMask.annealed(ratio, 1).with_lengths(jnp.array([40])).params()
        params = jax.tree.map(lambda x: x[0], params)
        queries, keys = corner[0] + jnp.arange(8), corner[1] + jnp.arange(8)
        allowed = spec.allowed(queries[:, None], keys[None], params, segments[queries][:, None], segments[keys][None])
        spans = [Span(x[0], x[-1]) for x in (queries, keys, segments[queries], segments[keys])]
        return *spec.tile_coverage(*spans[:2], params, *spans[2:]), allowed.any(), allowed.all()

    seen = set()
    for ratio in (0.0, 0.3, 1.0):
        some, every, found_some, found_every = map(np.asarray, tile(corners, ratio))
        assert (some >= found_some).all() and (every <= found_every).all()
        seen.update(zip(some.tolist(), every.tolist(), strict=True))
        if spec.kind != "annealed" or ratio == 0:  # the bound is exact, unless a tile spans several copies
            in_one_copy = np.full(len(corners), True)
            if spec.kind == "block_diffusion":
                in_one_copy = (corners // spec.text_length == (corners + 7) // spec.text_length).all(axis=1)
            np.testing.assert_array_equal(some[in_one_copy], found_some[in_one_copy])
            np.testing.assert_array_equal(every[in_one_copy], found_every[in_one_copy])
    assert seen == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("causal", [False, True])
def test_drafts_continue_longer_and_longer_texts(causal):
    """Groups of 2 after a text of 5, of which the two examples have 2 and 4 tokens: 0-4 is text, 5-6 a group, 7-8..."""
    mask = AttentionMask.drafts(5, 2, jnp.array([2, 4]), causal=causal)
    allowed = mask.allowed(jnp.arange(9), jnp.arange(9))
    for start, found in zip((2, 4), allowed, strict=True):
        expected = np.tri(9, dtype=bool)
        for group in range(2):
            seen = np.zeros(9, bool)
            seen[: min(start + group, 5)] = seen[5 + 2 * group : 7 + 2 * group] = True
            expected[5 + 2 * group : 7 + 2 * group] = seen
            expected[5 + 2 * group, 6 + 2 * group] &= not causal
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("window, causal", [(None, False), (3, True)])
def test_anchored_blocks(window, causal):
    """By the table of who sees whom: blocks of 2 in a text of 8, of two documents."""
    length, size, anchors, documents = 8, 2, np.array([[1, 6], [5, 3]]), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    mask = AttentionMask.anchored(length, size, anchors, causal=causal).with_window(window)
    mask = mask.with_segments(np.tile(documents, (2, 1)))
    found = allowed_of(mask, jnp.arange(length + 4), jnp.arange(length + 4))
    assert not found[:, :length].any()
    for row, block, slot in itertools.product(range(2), range(2), range(size)):
        anchor = anchors[row, block]
        text = [t for t in range(anchor) if documents[t] == documents[anchor]
                and (window is None or anchor + slot - t < window)]
        own = [length + block * size + other for other in range(size) if other <= slot or not causal]
        assert np.flatnonzero(found[row, length + block * size + slot]).tolist() == text + own


@pytest.mark.parametrize("mask", [
    AttentionMask.causal(), AttentionMask.block_causal(4), AttentionMask.block_causal(4, jnp.array([6, 0, 20])),
    AttentionMask.bidirectional(), AttentionMask.causal().with_window(3)],
    ids=["causal", "blocks", "clean", "all", "window"])
def test_no_query_sees_a_key_past_the_visible_ones(mask):
    for seed in range(20):
        queries = np.random.default_rng(seed).integers(-8, 40, (3, 5))  # some are no positions of keys
        number = int(mask.count_visible_keys(jnp.asarray(queries), 24))
        allowed = np.asarray(mask.allowed(jnp.asarray(queries), jnp.arange(24)))
        inside = (queries >= 0) & (queries < 24)
        allowed = np.broadcast_to(allowed, (3, 5, 24)) & inside[:, :, None]
        assert not allowed[:, :, number:].any()
        assert mask.spec.kind == "bidirectional" or not number or allowed[:, :, number - 1].any() or number == 1
