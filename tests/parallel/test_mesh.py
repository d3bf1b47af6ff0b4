import jax
import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.parallel import MeshConfig, describe_mesh, make_mesh


def test_one_axis_takes_what_the_others_leave():
    assert dict(make_mesh(MeshConfig(data=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert dict(make_mesh(MeshConfig(fsdp=1, tensor=-1)).shape)["tensor"] == 8
    assert make_mesh(devices=jax.devices()[:3]).size == 3


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(data=3), MeshConfig(fsdp=16)])
def test_sizes_that_do_not_make_up_the_devices_are_refused(config):
    with pytest.raises(ConfigError, match="needs .* devices, but there are 8"):
        make_mesh(config)


@pytest.mark.parametrize("config", [MeshConfig(data=-1, fsdp=-1), MeshConfig(data=0)])
def test_senseless_sizes_are_refused(config):
    with pytest.raises(ConfigError, match="positive"):
        make_mesh(config)


def test_description():
    assert describe_mesh(make_mesh(MeshConfig(data=2, fsdp=4))) == "8 x cpu: data=2 fsdp=4"
    assert describe_mesh(make_mesh(devices=jax.devices()[:1])) == "1 x cpu"
