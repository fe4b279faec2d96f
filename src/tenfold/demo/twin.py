"""A random network of V3.2's architecture, as wide as a V4 model: for bytes and seconds, it has learned nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tenfold import config as configuration
from tenfold.config import DeepseekV4Config
from tenfold.synth import synth, v32_twin

__all__ = ["TWIN", "written_twin"]

TWIN = "V3.2 twin"


@contextmanager
def written_twin(model: str) -> Iterator[Path]:
    """The folder of a twin of `model`; it goes with the block."""
    config = configuration.load(model)
    assert isinstance(config, DeepseekV4Config)
    with tempfile.TemporaryDirectory(prefix="tenfold-") as folder:
        synth(configuration.parse(v32_twin(config)), Path(folder) / "twin")
        yield Path(folder) / "twin"
