"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from ..checkpoint.meter import Meter
from ..checkpoint.sizes import format_bytes

__all__ = ["progress_bar"]

WINDOW = 5.0
"""Seconds that the current rate is taken over."""

EVERY = 10.0
"""Seconds between two lines where stderr is no terminal: nothing for a short run, and a log that stays readable for a long one."""


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
def progress_bar(what: str, quiet: bool, meter: Meter | None = None) -> Iterator[Callable[[int, int], None] | None]:
    """A function of (bytes done, bytes in all) that shows them, the rate of the last seconds and the time left; None when `quiet`.

    With a `meter` it says which stage sets the pace, and how fast that one is.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty():
        yield from _bar(what, meter)
    else:
        yield _lines(what, meter)


def _bar(what: str, meter: Meter | None) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what), BarColumn(bar_width=None), TaskProgressColumn(), TextColumn("{task.fields[bytes]}"),
        TimeRemainingColumn(compact=True), TextColumn("{task.fields[pace]}"),
    )  # fmt: skip
    rate = _Rate()
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("", total=None, bytes="", pace="")

        def update(done: int, total: int) -> None:
            speed = format_bytes(rate.add(done))
            bar.update(task, completed=done, total=total, bytes=f"{format_bytes(total)} at {speed}/s", pace=_pace(meter))

        yield update


def _lines(what: str, meter: Meter | None) -> Callable[[int, int], None]:
    rate, last = _Rate(), time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        speed = rate.add(done)
        if time.monotonic() - last < EVERY or done >= total:
            return
        last = time.monotonic()
        left = f", {(total - done) / speed:.0f} s left" if speed > 0 else ""
        share = f"{100 * done // total} % of {format_bytes(total)}"
        pace = _pace(meter)
        click.echo(f"{what}: {share}, {format_bytes(speed)}/s{left}{f', {pace}' if pace else ''}", err=True)

    return update


def _pace(meter: Meter | None) -> str:
    stage = meter.slowest() if meter is not None else None
    return f"{stage} sets the pace: {format_bytes(meter.rate(stage))}/s" if stage else ""
