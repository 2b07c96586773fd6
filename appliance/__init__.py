"""An open, self-optimizing inference appliance.

Importing this package is cheap: `LLM` and what it needs (torch) load on first use only, so that the server process
never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.types import SamplingParams

if TYPE_CHECKING:
    from appliance.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name == "LLM":
        from appliance.llm import LLM

        return LLM
    raise AttributeError(f"module 'appliance' has no attribute {name!r}")
