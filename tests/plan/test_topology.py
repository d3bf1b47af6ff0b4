import importlib.util
import math

import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.plan import gpu_target
from dlm_jax.plan.topology import Topology, read_topology, tpu_devices
from tests.plan.conftest import needs_libtpu, with_values


@pytest.mark.parametrize(("text", "name", "chips"), [
    ("v5e:4x4", "v5e:4x4", 16), ("v5p:2x4x4", "v5p:2x4x4", 32), ("v5e:1x1", "v5e:1x1", 1),
    ("2xv5e:16x16", "2xv5e:16x16", 512), ("v5litepod-16", "v5e:4x4", 16), ("v5e-256", "v5e:16x16", 256),
    ("v4-32", "v4:2x2x4", 16), ("v5p-8", "v5p:2x2x1", 4), ("v3-32", "v3:4x4", 16), ("v6e-8", "v6e:2x4", 8),
    ("4xv6e-256", "4xv6e:16x16", 1024), ("tpu7x:2x2x1", "tpu7x:2x2x1", 4),
])
def test_read_topology(text, name, chips):
    topology = read_topology(text)
    assert (topology.name, topology.slices * math.prod(topology.shape)) == (name, chips)
    assert read_topology(topology.name) == topology


@pytest.mark.parametrize("text", ["v5e", "v5e:", "v9:2x2", "v9-4", "v5e:2x2x1", "v4:2x2", "v5e:3x3", "v5e:0x2",
                                  "v4-31", "v5litepod-7"])
def test_invalid_topologies(text):
    with pytest.raises(ConfigError, match=text):
        read_topology(text)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"dlm_jax\[tpu\]"):
        tpu_devices(Topology("v5e", (2, 2)))


@needs_libtpu
@pytest.mark.parametrize(("text", "kind", "devices"), [
    ("v5e:1x1", "TPU v5 lite", 1), ("v5e:2x4", "TPU v5 lite", 8), ("v4:2x2x1", "TPU v4", 4), ("v5p:2x2x2", "TPU v5", 8),
    ("v6e:4x4", "TPU v6 lite", 16), ("v3:2x2", "TPU v3", 8), ("v2:2x2", "TPU v2", 8), ("tpu7x:2x2x1", "TPU7x", 8),
    ("2xv5e:2x2", "TPU v5 lite", 8)])
def test_tpu_devices(text, kind, devices):
    found = tpu_devices(read_topology(text))
    assert len(found) == devices and {device.device_kind for device in found} == {kind}


@needs_libtpu
def test_slice_indices():
    found = tpu_devices(read_topology("2xv5e:2x2"))
    assert sorted(device.slice_index for device in found) == [0] * 4 + [1] * 4


@pytest.mark.parametrize("text", ["h100", "h100:", "h100:0", "a100:8", "TPU:4", "h100:8:8"])
def test_invalid_gpus(config, base, text):
    with pytest.raises(ConfigError, match=text):
        gpu_target(config, base.config, text)


def test_gpu_attention(config, base):
    assert gpu_target(config, base.config, "H100:8").attention == "cudnn"
    old = gpu_target(config, base.config, "v100:8")
    assert old.attention == "xla" and "7.0" in old.reason
    with pytest.raises(ConfigError, match="cudnn"):
        gpu_target(with_values(config, model={"attention": "cudnn"}), base.config, "t4:1")
    target = gpu_target(with_values(config, model={"dtype": "float32"}), base.config, "h100:8")
    assert target.attention == "xla" and "bfloat16" in target.reason
    assert gpu_target(with_values(config, model={"attention": "xla"}), base.config, "h100:8").attention == "xla"


def test_gpu_meshes(config, base):
    mesh = gpu_target(with_values(config, mesh={"data": 2, "fsdp": -1}), base.config, "h100:8").mesh
    assert (mesh.size, mesh.shape["data"], mesh.shape["fsdp"]) == (8, 2, 4)
    with pytest.raises(ConfigError):
        gpu_target(with_values(config, mesh={"data": 3}), base.config, "h100:8")
    with pytest.raises(ConfigError, match=r"mesh\.tensor, mesh\.context"):
        gpu_target(with_values(config, mesh={"tensor": 2}), base.config, "h100:8")
