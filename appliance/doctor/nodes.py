"""Check of one of several nodes: whether node 0 can listen for the others, and whether the others find it.

Looks at addresses and ports only; whether the nodes go together is found out when they meet (`launch/node_hub.py`).
"""

from __future__ import annotations

import os
import socket

from appliance.doctor.check import Check
from appliance.errors import SettingsError
from appliance.runtime.node_channel import bind_address, listen
from appliance.settings import Settings
from appliance.settings_rules import check_place_of_node

_ANSWER_SECONDS = 3.0


def check_nodes(settings: Settings) -> Check:
    """On node 0: its port is free. On another: node 0's name has an address, and somebody listens there; if nobody
    does, that is no failure, since the other node may not have been started."""
    if settings.nnodes == 1:
        return Check("nodes", "skipped", "there is one node")
    try:
        check_place_of_node(settings)
    except SettingsError as error:
        return Check("nodes", "failed", error.message, error.hint or "")
    return _look_for_leader(settings) if settings.node_rank else _listen(settings)


def _listen(settings: Settings) -> Check:
    port = settings.master_port
    try:
        listen(bind_address(settings.master_addr), port).close()
    except OSError as error:
        fix = "stop what uses it, or choose another with --master-port, the same on all nodes"
        return Check("nodes", "failed", f"cannot listen for other nodes on port {port}: {_reason(error)}", fix)
    return Check("nodes", "ok", f"node 0 of {settings.nnodes} can listen for the others on port {port}")


def _look_for_leader(settings: Settings) -> Check:
    host, port = settings.master_addr or "", settings.master_port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        fix = "give the name or address of node 0 with --master-addr; in Kubernetes, a service has to publish its name"
        return Check("nodes", "failed", f"node 0's name {host} has no address: {_reason(error)}", fix)
    where = f"{host}:{port}" + ("" if found[0][4][0] == host else f" ({found[0][4][0]})")
    try:
        socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        fix = "start node 0; if it runs, --master-port is another there"
        return Check("nodes", "warning", f"nobody listens at node 0's {where} yet", fix)
    except OSError as error:
        fix = "start node 0's machine; if it runs, let nodes reach each other at every port (firewall, network policy)"
        return Check("nodes", "warning", f"node 0's {where} cannot be reached: {_reason(error)}", fix)
    return Check("nodes", "ok", f"node 0 listens at {where}")


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_ANSWER_SECONDS:g} s"
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))
