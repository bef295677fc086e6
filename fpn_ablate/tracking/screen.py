"""Live progress bars at the bottom of a terminal, by rich. They never wrap, and nothing of them is left when they close."""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

REFRESH = 0.1  # seconds between two drawings


@dataclass(frozen=True)
class Bar:
    """One line: title, bar, `count` (312/500), `detail` (loss 0.512  27 images/s) and `left` (0:58 left)."""

    title: str
    done: float = 0
    total: float = 0
    count: str = ""
    detail: str = ""
    left: str = ""


class Screen:
    """The bars of one process. They are drawn when `draw` is called, by no thread: loaders fork, and a fork keeps locks."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task
        from rich.table import Column
        from rich.text import Text

        class Field(ProgressColumn):
            """A text that is cut rather than wrapped."""

            def __init__(self, name: str, justify: Any = "left", shrink: bool = False) -> None:
                super().__init__(Column(no_wrap=not shrink, justify=justify))
                self.name = name

            def render(self, task: Task) -> Text:
                return Text(task.fields[self.name], no_wrap=True, overflow="ellipsis")

        self.console = console or Console(stderr=True, highlight=False)
        width = self.console.width
        bars = [BarColumn(max(8, min(40, width // 5)))] if width >= 60 else []
        columns = [Field("title", shrink=True), *bars, Field("count", "right"), Field("detail"), Field("left", "right")]
        both = sys.stdout.isatty()
        self._progress = Progress(
            *columns, console=self.console, auto_refresh=False, transient=True, redirect_stdout=both, redirect_stderr=True
        )
        self._ids: list[Any] = []
        self._drawn = 0.0
        self._progress.start()

    def draw(self, bars: Iterable[Bar], at_once: bool = False) -> None:
        """Show these bars in place of the former ones, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._drawn < REFRESH and not at_once:
            return
        self._drawn = now
        bars = list(bars)
        while len(self._ids) > len(bars):
            self._progress.remove_task(self._ids.pop())
        while len(self._ids) < len(bars):
            self._ids.append(self._progress.add_task("", title="", count="", detail="", left=""))
        for identifier, bar in zip(self._ids, bars, strict=True):
            fields = {name: getattr(bar, name) for name in ("title", "count", "detail", "left")}
            self._progress.update(identifier, completed=bar.done, total=bar.total or None, **fields)
        self._progress.refresh()

    def print(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, markup=False)

    def close(self) -> None:
        """Remove the bars."""
        self._progress.stop()
