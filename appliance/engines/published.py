"""Which scheme holds the weights of a checkpoint that others quantized, and with which parameters."""

from __future__ import annotations

from typing import Any

from appliance.errors import EngineBuildError
from appliance.types import Precision, Quantization

_HEAD = "lm_head"
_SCHEMES = {"fp8": "fp8", "int8": "int8_smoothquant", "int4": "int4_gptq"}


def scheme_of_published(facts: Quantization, precision: Precision) -> tuple[str, dict[str, Any]]:
    """(plug-in, parameters) of an engine that stores its weights as they are. EngineBuildError for another precision
    than that of the checkpoint, which would quantize it twice."""
    if precision != facts.precision:
        raise EngineBuildError(
            f"the checkpoint is already quantized to {facts.label}, so its precision cannot be {precision}; allowed: "
            f"{facts.precision}",
            hint="leave --precision (or the profile) out, or use the original, unquantized checkpoint",
        )
    parameters: dict[str, Any] = {"unquantized": list(facts.unquantized)}
    if precision == "int4":
        parameters |= {"group_size": facts.group_size, "act_order": facts.act_order}
    if precision != "fp8":  # the head is as the checkpoint has it, on every GPU
        parameters["head"] = "bf16" if _HEAD in facts.unquantized else precision
    if facts.static_input:
        parameters["static_input"] = True
    return "int4_awq" if facts.method == "awq" else _SCHEMES[precision], parameters
