"""What a start has loaded is not collected again, and cycles made later still are."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, weakref
from appliance import garbage

class Node: pass

before = [Node() for _ in range(30_000)]
garbage.settle()
assert gc.get_freeze_count() > 30_000
collections = []
gc.callbacks.append(lambda phase, info: collections.append(info["generation"]) if phase == "stop" else None)
kept = [[] for _ in range(15_000)]
assert not collections, "a burst of live objects is no reason to look"
cycle = Node()
cycle.self = cycle
gone = weakref.ref(cycle)
del cycle
more = [[] for _ in range(30_000)]
assert gone() is None, "a cycle made while serving is collected"
assert 1 <= len(collections) <= 3
"""


def test_settle() -> None:
    """In a process of its own: the collector is the whole process's."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60)
