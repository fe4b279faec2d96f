"""The engine process as the HTTP side sees it: start it, give it jobs, hear of them, know how it is.

Knows frames and processes; nothing of HTTP and nothing of models.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from tenfold.server.wire import Event, Heartbeat, Job, Ready

__all__ = ["Jobs"]


class Jobs(Protocol):
    """What the routes need of an engine; tests give them one without a model."""

    ready: Ready | None
    """None while loading, and while a dead engine is started again."""
    pulse: Heartbeat | None
    """The newest heartbeat."""

    def alive(self) -> bool:
        """Whether the engine makes progress: it is ready, and its heartbeat is at most some seconds old."""

    def run(self, job: Job) -> AsyncIterator[Event]:
        """The job's events; the last is Finished or Failed. Closing the iterator cancels the job."""

    async def cancel(self, job_id: str) -> None:
        """Stops a job; its iterator ends with Finished("cancelled")."""
