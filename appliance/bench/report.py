"""How benchmarks print: a table for people, one JSON object as the last line for scripts."""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

_console = Console(highlight=False, width=110)


def say(line: str) -> None:
    print(line, flush=True)


class Table:
    """Rows collected, then shown right-aligned."""

    def __init__(self, *columns: str) -> None:
        self._table = RichTable(box=None, pad_edge=False, title_justify="left", title_style="bold")
        for column in columns:
            self._table.add_column(column, justify="right")

    def row(self, *cells: object) -> None:
        self._table.add_row(*(str(cell) for cell in cells))

    def show(self, title: str) -> None:
        self._table.title = title
        _console.print(self._table)
        sys.stdout.flush()


def environment() -> dict[str, Any]:
    """Where and when, for the JSON line."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
