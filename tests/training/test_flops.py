import pytest

from dlm_jax.models import LoRAConfig, ModelConfig
from dlm_jax.training.flops import count_lora, count_params, peak_flops, train_flops

GPT2 = ModelConfig("gpt2", 50257, 768, 12, 12, 12, 64, 3072, 1024, norm="layer", positions="learned", gated_mlp=False,
                   qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=True)
LLAMA_7B = ModelConfig("llama", 32000, 4096, 32, 32, 32, 128, 11008, 4096, tie_embeddings=False)


def test_gpt2_parameters_and_flops():
    assert count_params(GPT2) == 124_439_808
    assert count_params(GPT2, "blocks") == 85_054_464
    # nanoGPT's estimate for GPT-2 with every token scored: 6 N + 12 L H Q T per token, N without positions.
    per_token = 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024
    assert train_flops(GPT2, 1, 1, 1024) == pytest.approx(per_token, rel=1e-3)
    assert train_flops(GPT2, 1, 0.5, 1024) == train_flops(GPT2, 1, 1, 1024) - 3 * 768 * 50257


def test_lora_saves_a_third_of_the_flops():
    full, lora = (train_flops(LLAMA_7B, 1e6, 5e5, 2048, lora=one) for one in (None, LoRAConfig(rank=16, alpha=32.0)))
    assert 0.65 < lora / full < 0.75


def test_clean_copy_beside_noised_lora_has_no_backward_pass():
    everywhere, noised = (train_flops(LLAMA_7B, 2e6, 1e6, 2048, LoRAConfig(rank=16, alpha=32.0, where=where), 1e6)
                          for where in ("all", "noised"))
    factors = 6 * count_lora(LLAMA_7B, LoRAConfig(rank=16, alpha=32.0))
    assert everywhere - noised == pytest.approx((2 * count_params(LLAMA_7B, "blocks") + factors) * 1e6)


@pytest.mark.parametrize("kind, peak", [
    ("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("cpu", None)])
def test_peak_flops(kind, peak):
    class Device:
        device_kind = kind

    assert peak_flops(Device()) == peak
