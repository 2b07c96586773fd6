"""INT4 weights, each rounded so as to make up for the errors of those before it: GPTQ (Frantar et al., "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023).

Names the scheme; the rounding is `quantization/calibration`, storage and products are `int4_storage.py`.
"""

from __future__ import annotations

from appliance.quantization.calibration import gptq
from appliance.quantization.calibration.block import BlockWeights, QuantizedBlock
from appliance.quantization.calibration.statistics import BlockStatistics
from appliance.quantization.int4_storage import Int4Scheme

PLUGIN = {
    "name": "int4_gptq",
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
    needs_hessian = True

    def calibrate(self, block: BlockWeights, statistics: BlockStatistics) -> QuantizedBlock:
        order: gptq.ActOrder = "on" if self.parameters["act_order"] else "static"
        return gptq.calibrate(block, statistics, gptq.GptqOptions(group_size=self.group_size, act_order=order))
