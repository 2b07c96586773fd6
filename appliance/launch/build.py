"""One engine built in a child process, its progress shown meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from appliance.builder import BuildRequest
from appliance.errors import ApplianceError, EngineBuildError
from appliance.ipc import Built, Failed, Progress, ToServer
from appliance.launch.child import Child, error_of
from appliance.settings import Settings, child_environment


async def run_builder(
    request: BuildRequest,
    settings: Settings,
    directory: Path,
    on_progress: Callable[[Progress], None],
    devices: Sequence[str] = (),
) -> Built:
    """Build in a child process, killed when cancelled. Raises what it failed with; EngineBuildError if it died.
    `devices`: UUIDs of the GPUs that it sees; none given: all that this process does."""
    encoded = msgspec.json.encode(request).decode()
    environment = child_environment(settings) | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})
    child = Child("builder", "appliance.builder", ["--request", encoded], directory=directory, environment=environment)
    ended: list[Built | ApplianceError] = []

    def on_message(message: ToServer) -> None:
        if isinstance(message, Progress):
            on_progress(message)
        elif isinstance(message, Built):
            ended.append(message)
        elif isinstance(message, Failed):
            ended.append(error_of(message, EngineBuildError))

    try:
        exited = await child.listen(on_message)
    finally:
        child.close()
    outcome = ended[0] if ended else EngineBuildError(str(exited), hint="see the log above")
    if isinstance(outcome, ApplianceError):
        raise outcome
    return outcome
