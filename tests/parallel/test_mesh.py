import dataclasses

import jax
import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.parallel import MeshConfig, describe_mesh, make_mesh
from dlm_jax.parallel.mesh import group_by_slice


def test_one_axis_takes_the_remaining_devices():
    assert dict(make_mesh(MeshConfig(data=2, tensor=2)).shape) == {
        "dcn_data": 1, "data": 2, "fsdp": 2, "tensor": 2, "context": 1, "expert": 1}
    assert dict(make_mesh(MeshConfig(fsdp=1, tensor=-1)).shape)["tensor"] == 8
    assert make_mesh(devices=jax.devices()[:3]).size == 3


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(data=3), MeshConfig(fsdp=16),
                                    MeshConfig(data=-1, fsdp=-1), MeshConfig(data=0)])
def test_refused_sizes(config):
    with pytest.raises(ConfigError, match="mesh"):
        make_mesh(config)


def test_description():
    assert describe_mesh(make_mesh(MeshConfig(data=2, fsdp=4))) == "8 x cpu: data=2 fsdp=4"
    assert describe_mesh(make_mesh(devices=jax.devices()[:1])) == "1 x cpu"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a multi-slice TPU system, with the attributes that the mesh reads."""

    id: int
    slice_index: int


def test_hardware_slices_are_not_divided_across():
    chips = [Chip(n, (n // 2) % 2) for n in range(8)]  # interleaved, because no order is promised
    first, second = group_by_slice(chips, 2)
    assert [chip.slice_index for chip in first + second] == [0] * 4 + [1] * 4
    assert [[chip.id for chip in group] for group in group_by_slice(chips, 4)] == [[0, 1], [4, 5], [2, 3], [6, 7]]
    for count in (1, 3):
        with pytest.raises(ConfigError, match=f"mesh.dcn_data={count}"):
            group_by_slice(chips, count)


def test_devices_without_slices_are_divided_in_order():
    mesh = make_mesh(MeshConfig(dcn_data=2, data=2))
    assert dict(mesh.shape) == {"dcn_data": 2, "data": 2, "fsdp": 2, "tensor": 1, "context": 1, "expert": 1}
    assert [device.id for device in mesh.devices.flat] == [device.id for device in jax.devices()]
    assert describe_mesh(mesh) == "8 x cpu: dcn_data=2 data=2 fsdp=2"
