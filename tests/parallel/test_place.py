import numpy as np
import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.parallel import MeshConfig, make_global_batch, make_mesh


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(data=2, fsdp=2, context=2), MeshConfig(fsdp=1, tensor=8)])
def test_each_part_is_read_once_and_lands_where_it_belongs(config):
    rows, asked = np.arange(16 * 8).reshape(16, 8), []

    def read(part):
        asked.append((part.start, part.stop))
        return {"rows": rows[part], "index": np.arange(16)[part]}

    placed = make_global_batch(read, 16, make_mesh(config))
    np.testing.assert_array_equal(placed["rows"], rows)
    np.testing.assert_array_equal(placed["index"], np.arange(16))
    assert len(asked) == len(set(asked)) and sum(stop - start for start, stop in asked) == 16


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="12 rows does not divide over the 8 parts"):
        make_global_batch(lambda part: np.zeros((12, 2))[part], 12, make_mesh())
