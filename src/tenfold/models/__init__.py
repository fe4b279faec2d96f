"""The architectures, one a file, and the choice of one. Knows nothing of sessions or of where weights come from."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tenfold.config import DeepseekV4Config, DeepseekV32Config, ModelConfig
from tenfold.models.blocks import Binder
from tenfold.models.deepseek_v4 import DeepseekV4
from tenfold.models.deepseek_v32 import DeepseekV32
from tenfold.step import Step

__all__ = ["Binder", "Model", "build"]


class Model(Protocol):
    """A network with its weights bound; all it changes are the streams of the step's sessions."""

    def forward(self, step: Step) -> Tensor:
        """Logits float32 [rows wanted, vocab]."""


def build(config: ModelConfig, bind: Binder) -> Model:
    """The network of a config, every tensor bound by name."""
    if isinstance(config, DeepseekV4Config):
        return DeepseekV4(config, bind)
    assert isinstance(config, DeepseekV32Config)
    return DeepseekV32(config, bind)
