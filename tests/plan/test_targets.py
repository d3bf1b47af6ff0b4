import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.parallel import MeshConfig, make_mesh
from dlm_jax.plan import gpu_target
from dlm_jax.plan.targets import described_mesh
from tests.plan.test_memory import changed


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2), MeshConfig(data=-1, fsdp=4),
                                  MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8, fsdp=1)])
def test_a_described_mesh_is_the_one_that_training_makes(mesh):
    assert dict(described_mesh(mesh, 8).shape) == dict(make_mesh(mesh).shape)


@pytest.mark.parametrize("mesh", [MeshConfig(data=3), MeshConfig(data=2, fsdp=2), MeshConfig(data=16)])
def test_what_training_refuses_is_refused(mesh):
    with pytest.raises(ConfigError):
        make_mesh(mesh)
    with pytest.raises(ConfigError, match="there are 8|positive"):
        described_mesh(mesh, 8)


@pytest.mark.parametrize("text", ["h100", "h100:", "h100:0", "a100:8", "TPU:4", "h100:8:8"])
def test_what_describes_no_gpus(config, base, text):
    with pytest.raises(ConfigError, match="NAME:COUNT"):
        gpu_target(config, base.config, text)


def test_attention_is_what_gpus_can_do(config, base):
    assert gpu_target(config, base.config, "H100:8").attention == "cudnn"
    old = gpu_target(config, base.config, "v100:8")
    assert (old.attention, old.reason) == ("xla", "cudnn needs compute capability 8.0, and this GPU has 7.0")
    with pytest.raises(ConfigError, match=r"^the attention backend cudnn needs compute capability 8.0"):
        gpu_target(changed(config, model={"attention": "cudnn"}), base.config, "t4:1")
    target = gpu_target(changed(config, model={"dtype": "float32"}), base.config, "h100:8")
    assert target.attention == "xla" and "bfloat16" in target.reason
    assert gpu_target(changed(config, model={"attention": "xla"}), base.config, "h100:8").attention == "xla"


def test_meshes_that_cannot_be_added_up_are_refused(config, base):
    with pytest.raises(ConfigError, match=r"mesh\.tensor and mesh\.context"):
        gpu_target(changed(config, mesh={"tensor": 2}), base.config, "h100:8")
