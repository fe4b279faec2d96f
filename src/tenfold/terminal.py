"""What people see: progress with a truthful ETA, tables, sizes. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

__all__ = ["ReadingClock", "about", "bytes_text", "duration_text", "out", "reading", "table", "talk", "warn"]

out = Console(highlight=False)
talk = Console(stderr=True, highlight=False)


def warn(message: str) -> None:
    """A warning on stderr; the command goes on."""
    talk.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def bytes_text(count: float) -> str:
    """Decimal units, as the paper counts: 3.53 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} B"


def duration_text(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


_DOUBT = 0.2
"""How far the expected costs are trusted: as much as chunks spread over three fifths of the read."""


class ReadingClock:
    """Time a prompt still needs, from the time its chunks took.

    Tokens are expected to cost alike, or as `weigh` was told. By what factor, the time of all chunks so far says; how
    the factor drifts with the position is fitted to them by least squares, where they lie far enough apart to tell:
    neighbours on the machine come and go, and a tenth of a read seen on a bad minute must not foretell the rest.
    """

    def __init__(self, total: int, show: Callable[[ReadingClock], None] | None = None) -> None:
        self.total, self.done, self.skipped = total, 0, 0
        self._show = show
        self._began = self._last = time.monotonic()
        self._seconds = self._cost = 0.0  # taken by all chunks, and expected of them
        self._seconds_moment = self._cost_moment = 0.0  # each times the place of its chunk
        self._tokens_moment = 0.0  # times the square of the place
        self._work: Callable[[int], float] = float
        self._doubt = 0.0

    def weigh(self, work: Callable[[int], float]) -> None:
        """Says before the first chunk what tokens cost, in any unit: the sum of those before a position."""
        self._work, self._doubt = work, _DOUBT

    def begin(self, done: int) -> None:
        """Says that the first `done` tokens need not be read."""
        self.done = self.skipped = done
        self._began = self._last = time.monotonic()
        if self._show is not None:
            self._show(self)

    def advance(self, done: int) -> None:
        """Says that the first `done` tokens are read."""
        now = time.monotonic()
        if done > self.done:
            self._count(done - self.done, (self.done + done) / 2 - self.skipped, now - self._last)
        self.done, self._last = done, now
        if self._show is not None:
            self._show(self)

    def _count(self, tokens: int, place: float, seconds: float) -> None:
        """One more chunk. `place` is its middle, from where reading began; only sums are kept, whatever the length."""
        cost = self._work(self.done + tokens) - self._work(self.done)
        self._seconds += seconds
        self._cost += cost
        self._seconds_moment += place * seconds
        self._cost_moment += place * cost
        self._tokens_moment += place**2 * tokens

    @property
    def elapsed_s(self) -> float:
        return self._last - self._began

    @property
    def tokens_per_s(self) -> float:
        """Over all that was read."""
        return (self.done - self.skipped) / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds the remaining tokens need; None before the first chunk is done."""
        if not self._cost:
            return None
        remaining = self.total - self.done
        expected = self._rate * (self._work(self.total) - self._work(self.done))
        behind = (self.total - self.skipped) / 2  # from the middle of what is read to the middle of what is not
        return max(expected + self._drift * remaining * behind, expected / 2)

    @property
    def _rate(self) -> float:
        return self._seconds / self._cost

    @property
    def _drift(self) -> float:
        """Seconds by which a token costs more than expected, for each token that it lies behind the middle.

        Chunks lie end to end, so the middle of their tokens is half of what they are, and what they took beyond the
        expected adds up to nothing: neither has to be taken from each place first.
        """
        spread = self._doubt * float(self.total - self.skipped) ** 3 / 12
        spread += self._tokens_moment - (self.done - self.skipped) ** 3 / 4
        return (self._seconds_moment - self._rate * self._cost_moment) / spread if spread > 0 else 0.0


@contextmanager
def reading(total: int, label: str = "reading") -> Iterator[ReadingClock]:
    """A progress bar on stderr with tokens/s and ETA; `advance` of the clock it yields moves the bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens  {task.fields[speed]}"),
    )
    with Progress(*columns, console=talk) as progress:
        task = progress.add_task(label, total=total, speed="")
        yield ReadingClock(total, lambda clock: progress.update(task, completed=clock.done, speed=about(clock)))


def about(clock: ReadingClock) -> str:
    """Speed and time left, in words."""
    if clock.eta_s is None:
        return ""
    left = f"{duration_text(clock.eta_s)} left" if clock.done < clock.total else duration_text(clock.elapsed_s)
    return f"{clock.tokens_per_s:,.0f} tokens/s  {left}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table; the first column is text, the others are figures."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
