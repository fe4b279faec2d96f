"""Where a model's weights lie when a GPU computes: all on it, or the routed experts in host memory.

Of experts in host memory the GPU keeps copies of the busiest, as many of each layer as fit; it reads the others across
the bus where they lie. Knows configs and bytes; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tenfold.config import ModelConfig
from tenfold.errors import DoesNotFit

__all__ = ["Placement", "place"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Bytes of weights on the GPU for ever and in host memory; copies of `hot_experts` of each layer come on top."""

    gpu_bytes: int
    host_bytes: int
    hot_experts: int
    hot_bytes: int

    @property
    def all_on_gpu(self) -> bool:
        return self.host_bytes == 0

    def told(self, config: ModelConfig) -> str:
        """In a line, for people."""
        if self.all_on_gpu:
            return f"all weights on the GPU, {self.gpu_bytes / 1e9:.1f} GB"
        return (
            f"{self.gpu_bytes / 1e9:.1f} GB of weights on the GPU, {self.host_bytes / 1e9:.1f} GB of experts in host "
            f"memory; copies of {self.hot_experts} of {config.n_routed_experts} experts a layer on the GPU, "
            f"{self.hot_bytes / 1e9:.1f} GB"
        )


def place(config: ModelConfig, sizes: Iterable[tuple[str, int]], gpu_bytes: int, session_bytes: int) -> Placement:
    """For weights of these components and sizes, on a GPU that has to keep `session_bytes` free of them.

    Raises DoesNotFit where even the weights of every token do not fit.
    """
    routed = dense = 0
    for component, num_bytes in sizes:
        routed += num_bytes * (component == "moe_routed")
        dense += num_bytes * (component != "moe_routed")
    free = gpu_bytes - session_bytes - dense
    if routed <= free:
        return Placement(dense + routed, 0, 0, 0)
    if free < 0:
        raise DoesNotFit(
            f"the weights that every token needs take {dense / 1e9:.1f} GB and a session {session_bytes / 1e9:.1f} GB, "
            f"and the GPU has {gpu_bytes / 1e9:.1f} GB; use --backend cpu, or a larger card"
        )
    one_of_each_layer = routed // config.n_routed_experts
    hot = min(config.n_routed_experts, free // max(1, one_of_each_layer))
    return Placement(dense, routed, hot, hot * one_of_each_layer)
