"""What the server on node 0 and the agents on the other nodes say to each other: MessagePack over TCP, with a length in
front of each message.

Knows the messages and how two nodes tell that they go together; not what is done upon a message.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import msgspec

from appliance import __version__
from appliance.engines import BUILDER_VERSION
from appliance.profiles import Selection
from appliance.settings import Settings, specs
from appliance.types import Struct

BEAT_SECONDS = 2.0  # between two words of an end that has nothing else to say
SILENCE_SECONDS = 30.0  # without a word: the other end is gone; ranks are missed sooner, by their own channel
_LENGTH = 4  # bytes
_LARGEST = 64 << 20  # bytes of a message

T = TypeVar("T")


class Hello(msgspec.Struct, frozen=True, tag=True):
    """An agent's first word. Other versions may have other fields, so none is forbidden."""

    node: int
    nnodes: int
    versions: dict[str, str]  # of what must be alike
    settings: dict[str, str]  # likewise


class Welcome(Struct, frozen=True, tag=True):
    """The agent belongs to this group of nodes."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It does not, and ends."""

    reason: str
    hint: str | None = None


class Obtain(Struct, frozen=True, tag=True):
    """Find, fetch or build the engine of what node 0 has selected; None: the engine directory that is the model.
    `repair`: if the one that is there is damaged, make another."""

    job: int
    selection: Selection | None
    repair: bool = False


class Obtained(Struct, frozen=True, tag=True):
    job: int
    key: str  # of the engine


class Leaving(Struct, frozen=True, tag=True):
    """Whoever says so was told to end, and soon closes the connection: no failure. Node 0 and agents say it."""

    reason: str


class AgentFailed(Struct, frozen=True, tag=True):
    """The agent ends. `error`: name of a class in errors.py."""

    error: str
    message: str
    hint: str | None = None


class RunRanks(Struct, frozen=True, tag=True):
    """Start this node's ranks: rank 0 of the engine listens at this port of node 0."""

    port: int
    token: str


class LeaderState(Struct, frozen=True, tag=True):
    """Where node 0 stands, as its health endpoints have it; also its sign of life."""

    phase: str
    reason: str


class AgentState(Struct, frozen=True, tag=True):
    """Likewise an agent."""

    phase: str
    detail: str = ""


ToAgent = Welcome | Refused | Obtain | RunRanks | LeaderState | Leaving
ToHub = Hello | Obtained | AgentFailed | AgentState | Leaving
_encode = msgspec.msgpack.Encoder().encode
decode_to_agent: msgspec.msgpack.Decoder[ToAgent] = msgspec.msgpack.Decoder(ToAgent)
decode_to_hub: msgspec.msgpack.Decoder[ToHub] = msgspec.msgpack.Decoder(ToHub)


async def read(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[T], seconds: float) -> T:
    """The next message. ConnectionError if the other end is gone, silent for so long, or speaks otherwise."""
    try:
        async with asyncio.timeout(seconds):
            length = int.from_bytes(await reader.readexactly(_LENGTH), "little")
            if length > _LARGEST:
                raise ConnectionError("it sends what is no message")
            return decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        raise ConnectionError("its connection was closed") from None
    except TimeoutError:
        raise ConnectionError(f"nothing was heard of it for {seconds:.0f} s") from None
    except msgspec.DecodeError as error:
        raise ConnectionError(f"it sends what is no message: {error}") from None
    except OSError as error:
        raise ConnectionError(str(error)) from error


def write(writer: asyncio.StreamWriter, message: ToAgent | ToHub) -> None:
    """Does not wait: messages are few."""
    data = _encode(message)
    writer.write(len(data).to_bytes(_LENGTH, "little") + data)


# ---------------------------------------------------------------- what must be alike

_GROUPS = ("profile selection", "engine (changing these rebuilds nothing)")
_ALSO = ("model", "calibration_data", "calibration_samples", "calibration_length")


def versions() -> dict[str, str]:
    """Of this node."""
    found = {"appliance": __version__, "builder": str(BUILDER_VERSION), "python": platform.python_version()}
    for name in ("torch", "triton", "flashinfer-python"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def common_settings(settings: Settings) -> dict[str, str]:
    """Those that must be alike on all nodes, since node 0's decide; as `serve --dry-run` shows them."""
    return {
        name: settings.shown(name)
        for name, spec in specs().items()
        if (spec.group in _GROUPS or name in _ALSO) and not spec.secret
    }


def difference(theirs: Hello, nnodes: int, own: Mapping[str, str]) -> str | None:
    """What does not go together, of an agent that says hello to node 0 with settings `own`; None if all does."""
    if theirs.nnodes != nnodes:
        return f"it is one of {theirs.nnodes} nodes, node 0 one of {nnodes}"
    if not 0 < theirs.node < nnodes:
        return f"there is no node {theirs.node} among {nnodes}"
    parts = _differences("{1} is {2} there and {3} on node 0", theirs.versions, versions())
    if parts:
        return "other versions: " + "; ".join(parts)
    parts = _differences("{0} is {2} there and {3} on node 0", theirs.settings, own)
    return "other settings: " + "; ".join(parts) if parts else None


def _differences(text: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    return [
        text.format(f"--{name.replace('_', '-')}", name, theirs.get(name, "not there"), ours.get(name, "not there"))
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
