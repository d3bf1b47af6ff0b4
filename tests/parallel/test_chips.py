"""The table of devices."""

import numpy as np

from dlm_jax.parallel.chips import CHIPS
from dlm_jax.training.flops import peak_flops


def test_chips():
    kinds = [kind for chip in CHIPS for kind in chip.kinds]
    for i, kind in enumerate(kinds):  # no earlier, shorter name hides it
        assert not any(earlier in kind for earlier in kinds[:i]), kind
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        found = peak_flops(type("Device", (), {"device_kind": f"NVIDIA {chip.kinds[0]}"}))
        assert found == chip.flops and (chip.network is None or chip.network < chip.interconnect)
        assert 20 < chip.flops / chip.memory_bandwidth < 700  # FLOP per byte: no figure is off by 1000
    assert np.log10([chip.interconnect for chip in CHIPS]).min() > 10
