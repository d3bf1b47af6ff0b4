import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask

N = 256


def square(mask: AttentionMask, n: int = N) -> np.ndarray:
    return np.asarray(mask.allowed(jnp.arange(n), jnp.arange(n)))


def upper(allowed: np.ndarray) -> np.ndarray:
    """The entries above the diagonal, which annealing decides."""
    return allowed[np.triu_indices(allowed.shape[-1], 1)]


def test_causal_and_bidirectional():
    np.testing.assert_array_equal(square(AttentionMask.causal())[0], np.tril(np.ones((N, N), bool)))
    assert square(AttentionMask.bidirectional()).all()


def test_annealing_ends_are_exact():
    for seed in range(4):
        np.testing.assert_array_equal(square(AttentionMask.annealed(0.0, seed)), square(AttentionMask.causal()))
        assert square(AttentionMask.annealed(1.0, seed)).all()


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.9])
def test_annealing_has_the_density_of_its_ratio(ratio):
    counts = np.stack([upper(square(AttentionMask.annealed(ratio, seed))[0]) for seed in range(8)])
    deviation = (counts.mean() - ratio) / np.sqrt(ratio * (1 - ratio) / counts.size)
    assert abs(deviation) < 4


def test_annealing_opens_monotonically():
    few, more = (square(AttentionMask.annealed(r, 7))[0] for r in (0.3, 0.6))
    assert (more >= few).all()


def test_annealing_is_independent_across_rows_columns_seeds_and_examples():
    base = square(AttentionMask.annealed(0.5, 3, jnp.arange(2)))
    other_seed = square(AttentionMask.annealed(0.5, 4, jnp.arange(1)))[0]
    bits = 2.0 * base[0] - 1
    inside = np.triu(np.ones((N, N), bool), 2)  # leaves room for a neighbour on both sides
    pairs = {
        "row": bits * np.roll(bits, -1, axis=0), "column": bits * np.roll(bits, 1, axis=1),
        "transpose-like shift": bits * np.roll(np.roll(bits, 1, 0), 1, 1),
        "example": bits * (2.0 * base[1] - 1), "seed": bits * (2.0 * other_seed - 1),
    }
    for name, product in pairs.items():
        sample = product[inside & np.roll(inside, -1, 0) & np.roll(inside, 1, 1)]
        assert abs(sample.mean()) * np.sqrt(sample.size) < 4.5, name
    # Row and column sums scatter as independent bits do.
    rows = [bits[i, i + 1:].sum() / np.sqrt(N - i - 1) for i in range(N - 32)]
    columns = [bits[:j, j].sum() / np.sqrt(j) for j in range(32, N)]
    assert 0.75 < np.var(rows) < 1.3 and 0.75 < np.var(columns) < 1.3


def test_a_tile_is_the_slice_of_the_square():
    segments = jnp.asarray(np.repeat(np.arange(8), N // 8)[None].repeat(2, 0))
    mask = AttentionMask.annealed(0.4, 11, jnp.array([5, 9])).with_segments(segments).with_lengths(
        jnp.array([N, 100])).with_window(90)
    tile = mask.allowed(jnp.arange(64, 128), jnp.arange(32, 160))
    np.testing.assert_array_equal(tile, square(mask)[:, 64:128, 32:160])


def test_per_example_pattern_follows_the_example_not_its_place():
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
    matrix = np.random.default_rng(0).random((n, n)) < 0.5
    np.testing.assert_array_equal(square(AttentionMask.matrix(matrix), n)[0], matrix)
    np.testing.assert_array_equal(
        AttentionMask.matrix(matrix).allowed(jnp.array([3, 1]), jnp.array([0, 5]))[0], matrix[[3, 1]][:, [0, 5]])


def test_ratio_and_seed_may_be_traced():
    allowed = jax.jit(lambda r, s: AttentionMask.annealed(r, s).allowed(jnp.arange(N), jnp.arange(N)))
    np.testing.assert_array_equal(allowed(0.3, 5), square(AttentionMask.annealed(0.3, 5)))
