"""Node 0's side of several nodes: agents connect here, obtain the engine that was selected, and start their ranks.

Lives as long as the server: agents outlive engines, and an agent that comes again (its node was restarted) is told
again what to do. Knows messages and connections; steps and ranks are the engine process's (`runtime/remote_nodes.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

from appliance import errors
from appliance.errors import ApplianceError, NodeError, SettingsError
from appliance.ipc import Nodes, NodesWanted, StartEngine
from appliance.launch import node_messages as wire
from appliance.launch.node_messages import (
    BEAT_SECONDS,
    SILENCE_SECONDS,
    AgentFailed,
    AgentState,
    Hello,
    LeaderState,
    Leaving,
    Obtain,
    Obtained,
    Refused,
    RunRanks,
    Welcome,
)
from appliance.profiles import Selection
from appliance.runtime.node_channel import bind_address, listen, plain_address
from appliance.runtime.remote_nodes import name_nodes
from appliance.server.lifecycle import Lifecycle
from appliance.settings import Settings
from appliance.types import EngineOptions

log = logging.getLogger("appliance.nodes")

SAY_SECONDS = 10.0  # between two lines about nodes that are missing
_LOOK_SECONDS = 0.2
_SAME_NODE_SECONDS = 3 * BEAT_SECONDS  # in which an agent that lives is heard again
_HELLO_SECONDS = 10.0


@dataclass
class _Agent:
    node: int
    host: str
    writer: asyncio.StreamWriter
    job: int = 0  # that it has obtained
    key: str = ""
    state: AgentState = field(default_factory=lambda: AgentState("starting"))
    heard: int = 0  # messages
    leaving: str = ""  # why it ends, if it was told to


class NodeHub:
    """`start` listens; `run` watches for as long as the server runs; `select`, `obtained`, `want` are the steps of a
    start and of every engine."""

    def __init__(self, settings: Settings, lifecycle: Lifecycle) -> None:
        self._settings = settings
        self._life = lifecycle
        lifecycle.nodes = self._list
        self._own = wire.common_settings(settings)
        self._address = bind_address(settings.master_addr)
        self._agents: dict[int, _Agent] = {}
        # Nodes that were told to end since they joined, and why: no engine lost them yet.
        self._left: dict[int, str] = {}
        self._job: Obtain | None = None
        self._wanted: RunRanks | None = None
        self._failed: ApplianceError | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._absent_since = self._said_missing = time.monotonic()
        self._showing = False  # progress says who is missing

    async def start(self) -> None:
        """SettingsError if the port is taken."""
        port = self._settings.master_port
        try:
            opened = listen(self._address, port)
        except OSError as error:
            raise SettingsError(
                f"cannot listen for other nodes on port {port}: {os.strerror(error.errno) if error.errno else error}",
                hint="stop what uses it, or choose another with --master-port, the same on all nodes",
            ) from error
        self._server = await asyncio.start_server(self._on_connection, sock=opened)
        log.info("node 0 of %d: the others meet it at port %d", self._settings.nnodes, port)

    async def run(self) -> None:
        """Raises NodeError when a node is missing for too long, and what an agent failed with before the server was
        ever ready."""
        told, said = time.monotonic(), ("", "")
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._failed is not None and not self._life.was_ready:
                raise self._failed
            state, now = (self._life.phase, self._life.reason), time.monotonic()
            if state != said or now - told > BEAT_SECONDS:
                self._send_all(LeaderState(*state))
                told, said = now, state
            self._look_for_missing()

    def _look_for_missing(self) -> None:
        missing, now = self.missing, time.monotonic()
        if not missing or self._life.is_ready:  # an engine that works has its nodes; its loss would be noticed
            self._absent_since = self._said_missing = now
            return
        waited, patience = now - self._absent_since, self._settings.node_timeout
        if waited > patience:
            raise NodeError(
                f"{name_nodes(missing)} of {self._settings.nnodes} did not come within {patience:.0f} s",
                hint=f"start one process a node, with --master-addr and port {self._settings.master_port} of this "
                "node, or give them longer with --node-timeout",
            )
        if now - self._said_missing >= SAY_SECONDS and not self._showing:
            self._said_missing = now
            log.info(
                "waiting for %s of %d (%.0f of %.0f s)", name_nodes(missing), self._settings.nnodes, waited, patience
            )

    @property
    def missing(self) -> list[int]:
        """Nodes that are not connected."""
        return [node for node in range(1, self._settings.nnodes) if node not in self._agents]

    # ------------------------------------------------------------ a start

    def select(self, selection: Selection | None, *, repair: bool = False) -> None:
        """Have all nodes obtain the engine of this selection, those that connect later too; None: the model is an
        engine directory."""
        self._job = Obtain(1 if self._job is None else self._job.job + 1, selection, repair)
        self._wanted = None
        self._send_all(self._job)

    async def obtained(self, key: str) -> None:
        """Wait until all nodes have the engine, which is this one. Progress shows in the lifecycle; NodeError if one
        has another."""
        if self.missing:
            log.info("waiting for %s of %d", name_nodes(self.missing), self._settings.nnodes)
        self._showing = True
        try:
            while waiting := [node for node in range(1, self._settings.nnodes) if not self._has_engine(node)]:
                self._life.progress(detail="; ".join(map(self._describe, waiting)))
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            self._showing = False
        for agent in self._agents.values():
            if agent.key != key:
                raise NodeError(
                    f"node {agent.node} ({agent.host}) has engine {agent.key[:12]}, node 0 {key[:12]}",
                    hint="all nodes need the same checkpoint: the same model and revision",
                )

    def _has_engine(self, node: int) -> bool:
        return node in self._agents and self._job is not None and self._agents[node].job == self._job.job

    def _list(self) -> list[dict[str, Any]]:
        """For the health endpoints: the nodes other than this one."""
        found = []
        for node in range(1, self._settings.nnodes):
            agent = self._agents.get(node)
            if agent is None:
                found.append({"node": node, "host": None, "phase": "missing", "reason": "it is not connected"})
            else:
                state = agent.state
                found.append({"node": node, "host": agent.host, "phase": state.phase, "reason": state.detail})
        return found

    def _describe(self, node: int) -> str:
        agent = self._agents.get(node)
        if agent is None:
            waited, patience = time.monotonic() - self._absent_since, self._settings.node_timeout
            return f"waiting for node {node} of {self._settings.nnodes} ({waited:.0f} of {patience:.0f} s)"
        state = agent.state
        return f"node {node}: {state.phase}" + (f", {state.detail}" if state.detail else "")

    # ------------------------------------------------------------ an engine

    def start_message(self, options: EngineOptions) -> StartEngine:
        """To an engine process that is to begin."""
        self._wanted = None
        return StartEngine(options, Nodes(self._settings.nnodes, self._address, self._settings.node_timeout))

    def want(self, wanted: NodesWanted) -> None:
        """An engine process waits for the ranks of the other nodes."""
        self._wanted = RunRanks(wanted.port, wanted.token)
        for agent in self._agents.values():
            if self._has_engine(agent.node):
                wire.write(agent.writer, self._wanted)

    def excuse(self) -> str | None:
        """Why an engine that has just ended was meant to: nodes of it were told to end. Each excuses one engine. None:
        it was not meant to."""
        left, self._left = self._left, {}
        return "; ".join(f"node {node} has left: {reason}" for node, reason in sorted(left.items())) or None

    # ------------------------------------------------------------ agents

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._converse(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host = plain_address((writer.get_extra_info("peername") or ["an address that is gone"])[0])
        agent: _Agent | None = None
        try:
            agent = await self._receive(reader, writer, host)
            while agent is not None:
                message = await wire.read(reader, wire.decode_to_hub, SILENCE_SECONDS)
                self._on_message(agent, message)
        except ConnectionError as error:
            if agent is None:
                log.warning("a connection from %s was refused: %s", host, error)
            elif self._agents.get(agent.node) is agent:
                level, reason = (logging.INFO, agent.leaving) if agent.leaving else (logging.WARNING, str(error))
                log.log(level, "node %d (%s) is gone: %s", agent.node, host, reason)
        finally:
            if agent is not None and self._agents.get(agent.node) is agent:
                del self._agents[agent.node]
            writer.close()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> _Agent | None:
        """Take an agent in; None if it does not go with this node, which both then say."""
        hello = await wire.read(reader, wire.decode_to_hub, _HELLO_SECONDS)
        if not isinstance(hello, Hello):
            raise ConnectionError("it does not say which node it is")
        reason = wire.difference(hello, self._settings.nnodes, self._own)
        hint = "start all nodes with the same image and the same settings"
        while reason is None and (former := self._agents.get(hello.node)) is not None:
            if await self._lives(former):
                reason, hint = f"{former.host} is node {hello.node}", "give each node a --node-rank of its own"
            elif self._agents.get(hello.node) is former:
                del self._agents[hello.node]
                former.writer.close()
        if reason is not None:
            log.error("node %d (%s) was refused: %s", hello.node, host, reason)
            wire.write(writer, Refused(reason, hint))
            await writer.drain()
            return None
        agent = _Agent(hello.node, host, writer)
        self._agents[agent.node] = agent
        self._left.pop(agent.node, None)
        left = f", waiting for {name_nodes(self.missing)}" if self.missing else ", all are here"
        log.info("node %d of %d (%s) is here%s", agent.node, self._settings.nnodes, host, left)
        wire.write(writer, Welcome())
        if self._job is not None:
            wire.write(writer, self._job)
        return agent

    async def _lives(self, agent: _Agent) -> bool:
        """Whether it is heard once more; what comes back may be quicker than the news that it was gone."""
        heard, deadline = agent.heard, time.monotonic() + _SAME_NODE_SECONDS
        while self._agents.get(agent.node) is agent and time.monotonic() < deadline:
            if agent.heard > heard:
                return True
            await asyncio.sleep(_LOOK_SECONDS)
        return False

    def _on_message(self, agent: _Agent, message: wire.ToHub) -> None:
        agent.heard += 1
        match message:
            case AgentState():
                agent.state = message
            case Obtained(job=job, key=key):
                agent.job, agent.key = job, key
                if self._wanted is not None and self._has_engine(agent.node):
                    wire.write(agent.writer, self._wanted)
            case Leaving(reason=reason):
                log.info("node %d (%s) leaves: %s", agent.node, agent.host, reason)
                agent.leaving = self._left[agent.node] = reason
            case AgentFailed(error=error, message=text, hint=hint):
                kind = getattr(errors, error, NodeError)
                known = isinstance(kind, type) and issubclass(kind, ApplianceError)
                self._failed = (kind if known else NodeError)(f"node {agent.node} ({agent.host}): {text}", hint=hint)
                log.error("%s", self._failed)
            case Hello():
                raise ConnectionError("it says hello twice")

    def _send_all(self, message: wire.ToAgent) -> None:
        for agent in self._agents.values():
            wire.write(agent.writer, message)

    async def stop(self) -> None:
        """Let the agents go, which are told so unless the server failed. Idempotent."""
        if self._server is not None:
            self._server.close()
        if self._life.phase != "failed":
            self._send_all(Leaving("the server was told to end"))
        for agent in self._agents.values():
            agent.writer.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
