import importlib.util

import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.plan.topology import Topology, read_topology, tpu_devices

with_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.mark.parametrize(("text", "name", "chips"), [
    ("v5e:4x4", "v5e:4x4", 16), ("v5p:2x4x4", "v5p:2x4x4", 32), ("v5e:1x1", "v5e:1x1", 1),
    ("2xv5e:16x16", "2xv5e:16x16", 512), ("v5litepod-16", "v5e:4x4", 16), ("v5e-256", "v5e:16x16", 256),
    ("v4-32", "v4:2x2x4", 16), ("v5p-8", "v5p:2x2x1", 4), ("v3-32", "v3:4x4", 16), ("v6e-8", "v6e:2x4", 8),
    ("4xv6e-256", "4xv6e:16x16", 1024), ("tpu7x:2x2x1", "tpu7x:2x2x1", 4),
])
def test_names(text, name, chips):
    topology = read_topology(text)
    assert (topology.name, topology.num_chips) == (name, chips)
    assert read_topology(topology.name) == topology


@pytest.mark.parametrize(("text", "says"), [
    ("v5e", "GENERATION:SHAPE"), ("v5e:", "GENERATION:SHAPE"), ("v9:2x2", "unknown generation"),
    ("v9-4", "unknown generation"), ("v5e:2x2x1", "3 axes"), ("v4:2x2", "2 axes"), ("v5e:3x3", "hosts of 2x2"),
    ("v5e:0x2", "hosts of 2x2"), ("v4-31", "no usual shape"), ("v5litepod-7", "no usual shape"),
])
def test_what_is_no_topology(text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        read_topology(text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "dlm_jax\[tpu\]"'):
        tpu_devices(Topology("v5e", (2, 2)))


@with_libtpu
@pytest.mark.parametrize(("text", "kind", "devices"), [
    ("v5e:1x1", "TPU v5 lite", 1), ("v5e:2x4", "TPU v5 lite", 8), ("v4:2x2x1", "TPU v4", 4), ("v5p:2x2x2", "TPU v5", 8),
    ("v6e:4x4", "TPU v6 lite", 16), ("v3:2x2", "TPU v3", 8), ("v2:2x2", "TPU v2", 8), ("tpu7x:2x2x1", "TPU7x", 8),
    ("2xv5e:2x2", "TPU v5 lite", 8)])
def test_devices(text, kind, devices):
    found = tpu_devices(read_topology(text))
    assert len(found) == devices and {device.device_kind for device in found} == {kind}


@with_libtpu
def test_slices_are_told_apart():
    found = tpu_devices(read_topology("2xv5e:2x2"))
    assert sorted(device.slice_index for device in found) == [0] * 4 + [1] * 4
