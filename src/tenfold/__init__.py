"""tenfold: read a million tokens with DeepSeek V4 on your own hardware."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tenfold.engine import Engine, Session
    from tenfold.sampler import SamplingParams

__all__ = ["Engine", "SamplingParams", "Session"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: `tenfold --help` must not wait for torch."""
    if name in ("Engine", "Session"):
        from tenfold import engine

        return getattr(engine, name)
    if name == "SamplingParams":
        from tenfold.sampler import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'tenfold' has no attribute {name!r}")
