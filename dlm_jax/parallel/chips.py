"""The speed and memory of devices, from the vendors' data sheets."""

import dataclasses

import jax

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device: a core on TPU v2, v3 and 7x, and a chip otherwise.

    Attributes:
      name: the name in commands and configs.
      kinds: its names in JAX; `device_kind` contains one of them.
      flops: dense bfloat16 (V100, T4: float16) peak, FLOP/s.
      memory: GiB that a program can use: the limit of a TPU's compiler, or a GPU's memory without the driver's.
      memory_bandwidth: bytes/s.
      interconnect: bytes/s sent to its neighbors: over all links of a TPU's torus at once, over NVLink within a host
        of GPUs, or over PCIe where there is no NVLink.
      network: bytes/s sent beyond those: a TPU's share of the data center's network, or a GPU's in the usual hosts of
        eight; None where nothing is published.
      capability: a GPU's compute capability.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    memory_bandwidth: float
    interconnect: float
    network: float | None = None
    capability: tuple[int, int] | None = None


# TPU: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), where the interconnect is given in Gbit/s in one direction
# or in GB/s in both; v2 and v3: Jouppi et al., CACM 63(7), 2020. Memory is libtpu's limit, found by what it refuses.
# GPU: NVIDIA's data sheets (NVLink's figure is for both directions) and those of DGX systems for the network.
# `find_chip` takes the first match, so longer names precede shorter ones.
CHIPS = (
    Chip("v2", ("TPU v2",), 22.5e12, 7.48, 350e9, 124e9),
    Chip("v3", ("TPU v3",), 61.5e12, 15.48, 450e9, 164e9),
    Chip("v4", ("TPU v4",), 275e12, 30.75, 1228e9, 300e9),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75, 819e9, 200e9, 3.125e9),
    Chip("v5p", ("TPU v5",), 459e12, 95.74, 2765e9, 600e9, 6.25e9),
    Chip("v6e", ("TPU v6",), 918e12, 31.25, 1638e9, 400e9, 12.5e9),
    Chip("tpu7x", ("TPU7x",), 1153.5e12, 94.75, 3690e9, 300e9, 6.25e9),
    Chip("gb200", ("GB200",), 2500e12, 184, 8000e9, 900e9, 50e9, capability=(10, 0)),
    Chip("b200", ("B200",), 2250e12, 178, 8000e9, 900e9, 50e9, capability=(10, 0)),
    Chip("gh200", ("GH200",), 989e12, 95, 4000e9, 450e9, 50e9, capability=(9, 0)),
    Chip("h200", ("H200",), 989e12, 140, 4800e9, 450e9, 50e9, capability=(9, 0)),
    Chip("h100-pcie", ("H100 PCIe",), 756e12, 79, 2000e9, 64e9, 25e9, capability=(9, 0)),
    Chip("h100", ("H100",), 989e12, 79, 3350e9, 450e9, 50e9, capability=(9, 0)),
    Chip("a100-80", ("A100-SXM4-80GB", "A100-SXM-80GB", "A100 80GB"), 312e12, 79, 2039e9, 300e9, 25e9,
         capability=(8, 0)),
    Chip("a100-40", ("A100",), 312e12, 39, 1555e9, 300e9, 25e9, capability=(8, 0)),
    Chip("l40s", ("L40S",), 362e12, 44, 864e9, 32e9, 12.5e9, capability=(8, 9)),
    Chip("l4", ("L4",), 121e12, 22, 300e9, 32e9, 12.5e9, capability=(8, 9)),
    Chip("a10", ("A10",), 125e12, 22, 600e9, 32e9, 12.5e9, capability=(8, 6)),
    Chip("rtx4090", ("RTX 4090",), 165e12, 23, 1008e9, 32e9, capability=(8, 9)),
    Chip("v100", ("V100",), 125e12, 31, 900e9, 150e9, 12.5e9, capability=(7, 0)),
    Chip("t4", ("T4",), 65e12, 14, 320e9, 16e9, 12.5e9, capability=(7, 5)),
)


def find_chip(device: jax.Device) -> Chip | None:
    """Returns the table's entry for a device; None if it has none, as for CPUs."""
    return next((chip for chip in CHIPS if any(kind in device.device_kind for kind in chip.kinds)), None)
