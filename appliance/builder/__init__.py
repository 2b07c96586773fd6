"""The builder: checkpoint + precision + device -> engine in the store.

Importing it imports no torch (`BuildRequest`, `key_of` are for the control plane); `appliance.builder.build` does.
"""

from __future__ import annotations

from appliance.builder.request import BuildRequest, key_inputs_of, key_of

__all__ = ["BuildRequest", "key_inputs_of", "key_of"]
