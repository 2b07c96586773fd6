"""Looks at a machine before anything is downloaded: what would go wrong at a start, each with its fix, in seconds.

Every check is a function of the settings (and the detected hardware) that gives one `Check`; none changes anything but
the cache directory, which is made if it is missing, as a start would.

    check.py      a check's outcome, as text and as JSON
    machine.py    packages, driver, GPUs, links, kernels, shared memory, cache, temporary files, port
    nodes.py      of several nodes: node 0's port, from here
    model.py      the model here or on the hub, room for it, the engine source
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from appliance.doctor import machine, model, nodes
from appliance.doctor.check import Check, Status, as_json, as_text, passed
from appliance.settings import Settings
from appliance.types import Hardware

__all__ = ["Check", "Status", "as_json", "as_text", "examine", "passed"]


def examine(settings: Settings, hardware: Hardware, *, shm: Path = Path("/dev/shm")) -> list[Check]:
    """All checks, in the order in which a start would meet the problems; those that wait for another machine at the
    same time, so that all take a few seconds at most."""
    checks: list[Callable[[], Check]] = [
        lambda: machine.check_packages(hardware),
        lambda: machine.check_driver(settings, hardware),
        lambda: machine.check_gpus(hardware),
        lambda: machine.check_links(hardware),
        lambda: machine.check_kernels(settings, hardware),
        lambda: machine.check_shared_memory(hardware, shm),
        lambda: machine.check_cache(settings),
        lambda: machine.check_temporary(),
        lambda: machine.check_port(settings),
        lambda: nodes.check_nodes(settings),
        lambda: model.check_engine_source(settings),
    ]
    with ThreadPoolExecutor(len(checks) + 1) as pool:
        about_model = pool.submit(model.check_model, settings)
        return [job.result() for job in [pool.submit(check) for check in checks]] + about_model.result()
