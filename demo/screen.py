"""What the demo shows in a terminal: acts, findings, tables, and progress of what is long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table

WIDTH = 100


class Screen:
    """Prints to stdout; a terminal gets colours and live bars, a file or pipe plain lines."""

    def __init__(self) -> None:
        terminal = sys.stdout.isatty()
        self.console = Console(width=None if terminal else WIDTH, highlight=False, soft_wrap=False)
        self.started = time.monotonic()

    def elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes}:{seconds:02}"

    def act(self, title: str) -> None:
        self.console.print()
        self.console.print(Rule(f"[bold]{escape(title)}[/]  [dim]{self.elapsed()}[/]", align="left"))

    def say(self, text: str) -> None:
        self.console.print(escape(text))

    def call(self, code: str) -> None:
        """A line of code that the reader could run."""
        self._indented(f"[cyan]>>> {escape(code)}[/]")

    def answer(self, text: str) -> None:
        self._indented(escape(text))

    def good(self, text: str) -> None:
        self._indented(f"[green]✓[/] {escape(text)}")

    def note(self, text: str) -> None:
        self._indented(f"[dim]{escape(text)}[/]")

    def _indented(self, markup: str) -> None:
        self.console.print(Padding(markup, (0, 0, 0, 2)))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
        """The first `left` columns are text, the others numbers."""
        table = Table(box=None, header_style="bold", padding=(0, 1))
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self.console.print(Padding(table, (0, 0, 0, 1)))

    @contextmanager
    def bars(self) -> Iterator[Progress]:
        with Progress(
            TextColumn("  {task.description:<34}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}[/]"),
            console=self.console,
        ) as progress:
            yield progress


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
