"""INT4 weights whose scales were searched with the layers' inputs in view: AWQ (Lin et al., "AWQ: Activation-aware
Weight Quantization for LLM Compression and Acceleration", MLSys 2024).

Names the scheme; the search is `quantization/calibration`, storage and products are `int4_storage.py`.
"""

from __future__ import annotations

from appliance.quantization.calibration import awq
from appliance.quantization.calibration.block import BlockWeights, QuantizedBlock
from appliance.quantization.calibration.statistics import BlockStatistics
from appliance.quantization.int4_storage import Int4Scheme

PLUGIN = {
    "name": "int4_awq",
    "precisions": ["int4"],
    "weight_bits": 4,
    "activation_bits": 16,
    "min_compute_capability": [7, 5],
    # Largest relative error of a product, per precision, that the builder's self-check accepts (builder/selfcheck.py):
    # of weights rounded here, and of weights that were stored as they came.
    "tolerance": {"int4": 0.2},
    "exact_tolerance": {"int4": 1e-2},
    "calibrated": True,
    "parameters": {"group_size": 128, "act_order": False, "head": "bf16", "unquantized": []},
    # Parameters that are others on GPUs from a compute capability on.
    "parameters_from": {"8.9": {"head": "fp8"}},
}


class Scheme(Int4Scheme):
    facts = PLUGIN

    def calibrate(self, block: BlockWeights, statistics: BlockStatistics) -> QuantizedBlock:
        return awq.calibrate(block, statistics, awq.AwqOptions(group_size=self.group_size))
