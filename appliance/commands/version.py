"""`version`: of the appliance, and with `--json` of what decides its results. Imports none of it."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version

from appliance import __version__
from appliance.engines import BUILDER_VERSION

_PACKAGES = ("torch", "triton", "flashinfer-python", "transformers")


def run_version(args: argparse.Namespace) -> int:
    if not args.json:
        print(__version__)
        return 0
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    facts = {"version": __version__, "builder": BUILDER_VERSION, "python": platform.python_version()}
    print(json.dumps(facts | {"packages": found}))
    return 0
