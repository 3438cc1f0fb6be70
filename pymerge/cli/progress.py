"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import click

from ..checkpoint.meter import Meter
from ..checkpoint.sizes import format_bytes

__all__ = ["Progress", "shown"]

WINDOW = 5.0
"""Seconds that the current rate is taken over."""

EVERY = 10.0
"""Seconds between two lines where stderr is no terminal: nothing for a short run, and a log that stays readable for a long one."""


TICK = 0.2
"""Seconds between two looks at what has been done."""


class Progress:
    """Bytes done so far and in all, and who knows how fast: written by who works, read by who shows.

    Attributes:
        done, total: bytes.
        meter: of the stages, if there are any; then its bytes read and written are what has been done.
    """

    def __init__(self, total: int = 0, meter: Meter | None = None) -> None:
        self.done, self.total, self.meter = 0, total, meter

    def __call__(self, done: int, total: int) -> None:
        """For functions that report their progress by calling."""
        self.done, self.total = done, total

    def look(self) -> tuple[int, int]:
        """(bytes done, bytes in all)."""
        done = self.done if self.meter is None else self.meter.bytes["reading"] + self.meter.bytes["writing"]
        total = self.total - (0 if self.meter is None else self.meter.before)
        return min(done, total), total

    def pace(self) -> str:
        """Which stage the others wait for, and how fast it is."""
        stage = self.meter.slowest() if self.meter is not None else None
        return f"{stage} sets the pace: {format_bytes(self.meter.rate(stage))}/s" if stage else ""


class _Rate:
    """Bytes per second over the last few seconds."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def add(self, done: int) -> float:
        now = time.monotonic()
        self._points.append((now, done))
        while len(self._points) > 2 and now - self._points[1][0] >= WINDOW:
            self._points.popleft()
        then, before = self._points[0]
        return (done - before) / max(now - then, 1e-9)


@contextmanager
def shown(what: str, progress: Progress, quiet: bool) -> Iterator[None]:
    """Show `progress` on stderr while this block runs: bytes, the rate of the last seconds, the time left, the slowest stage.

    On a terminal a bar that is gone afterwards; elsewhere a line every few seconds; nothing when `quiet`.
    """
    if quiet:
        yield
        return
    with _Bar(what, progress) if sys.stderr.isatty() else nullcontext(_Lines(what, progress)) as show:
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(TICK):
                show()

        ticker = threading.Thread(target=tick, name="pymerge-progress", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            ended.set()
            ticker.join()


class _Bar:
    def __init__(self, what: str, progress: Progress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Live

        columns = (
            TextColumn(what), BarColumn(bar_width=None), TaskProgressColumn(), TextColumn("{task.fields[bytes]}"),
            TimeRemainingColumn(compact=True), TextColumn("{task.fields[pace]}"),
        )  # fmt: skip
        # The terminal writes ^C behind the bar; it must not wrap, or the bar could not be found again to be wiped.
        console = Console(stderr=True, width=max(20, shutil.get_terminal_size().columns - 4))
        self._live = Live(*columns, console=console, transient=True, expand=True, auto_refresh=False)
        self._progress, self._rate = progress, _Rate()

    def __enter__(self) -> _Bar:
        self._live.start()
        self._task = self._live.add_task("", total=None, bytes="", pace="")
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def __call__(self) -> None:
        done, total = self._progress.look()
        if total:
            text = f"{format_bytes(total)} at {format_bytes(self._rate.add(done))}/s"
            self._live.update(self._task, completed=done, total=total, bytes=text, pace=self._progress.pace(), refresh=True)


class _Lines:
    def __init__(self, what: str, progress: Progress) -> None:
        self._what, self._progress, self._rate, self._last = what, progress, _Rate(), time.monotonic()

    def __call__(self) -> None:
        done, total = self._progress.look()
        speed, now = self._rate.add(done), time.monotonic()
        if now - self._last < EVERY or not total:
            return
        self._last = now
        parts = [f"{100 * done // total} % of {format_bytes(total)}", f"{format_bytes(speed)}/s"]
        parts += [f"{(total - done) / speed:.0f} s left"] if speed > 0 else []
        parts += [self._progress.pace()] if self._progress.pace() else []
        click.echo(f"{self._what}: {', '.join(parts)}", err=True)
