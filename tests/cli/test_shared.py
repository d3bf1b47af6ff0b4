"""What `--mesh` means."""

import pytest

from dlm_jax.cli.shared import read_mesh
from dlm_jax.errors import ConfigError
from dlm_jax.parallel import MeshConfig


def test_read_mesh():
    assert read_mesh("data=2,tensor=4") == MeshConfig(data=2, fsdp=1, tensor=4)
    assert read_mesh("fsdp=-1") == MeshConfig(fsdp=-1)


@pytest.mark.parametrize("text", ["", "fsdp", "rows=2", "data=two", "data=2,,tensor=2", "data=2.5"])
def test_read_mesh_refuses_with_an_example(text):
    with pytest.raises(ConfigError, match="fsdp=-1"):
        read_mesh(text)
