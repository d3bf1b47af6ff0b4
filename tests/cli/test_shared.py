"""What the commands that use a model have in common."""

import pytest

from dlm_jax.cli.shared import read_mesh
from dlm_jax.errors import ConfigError
from dlm_jax.parallel import MeshConfig


def test_a_mesh_is_written_as_axes_with_sizes():
    assert read_mesh("data=2,tensor=4") == MeshConfig(data=2, fsdp=1, tensor=4)
    assert read_mesh("fsdp=-1") == MeshConfig(fsdp=-1)


@pytest.mark.parametrize("text", ["", "fsdp", "rows=2", "data=two", "data=2,,tensor=2", "data=2.5"])
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="write for example fsdp=-1"):
        read_mesh(text)
