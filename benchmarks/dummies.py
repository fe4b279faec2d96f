"""A model of any size without a checkpoint: random weights made on the device, routed experts shared between layers.

Layer i has the experts of set i mod `sets`, so that the whole depth fits one card while every layer's dense weights
are its own and each set is far larger than any cache. Values keep a random network healthy: every output is finite.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tenfold import checkpoint, ops
from tenfold.budget import Budget
from tenfold.checkpoint import TensorSpec
from tenfold.config import ModelConfig
from tenfold.decoding import Decoder
from tenfold.engine import Engine
from tenfold.formats import BF16, F32, FP8_BLOCK, FP8_BLOCK_F32, I64, MXFP4, WeightFormat
from tenfold.models import Binder, build
from tenfold.ops import Ops, Weight

__all__ = ["Dummies", "dummy_engine"]

_EXPERT = re.compile(r"layers\.(\d+)\..*experts\.\d+\.")
_E4M3_RMS, _E2M1_RMS = 153.0, 2.93  # of codes drawn evenly, NaN left out
_SPREAD = {"norm.weight": (1.0, 0.1), "_scale": (0.7, 0.1), "_base": (0.0, 0.5), "attn_sink": (0.0, 1.0)}


@dataclass(slots=True)
class Dummies:
    """Weights by name, drawn when they are taken; `sets` of routed experts."""

    config: ModelConfig
    device: torch.device
    sets: int
    specs: dict[str, TensorSpec] = field(init=False)
    shared: dict[str, Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.specs = {spec.name: spec for spec in checkpoint.tensors(self.config)}

    def take(self, name: str) -> Weight:
        spec = self.specs[name]
        if spec.component != "moe_routed":
            return self._drawn(spec)
        alias = _EXPERT.sub(lambda m: m.group(0).replace(m.group(1), str(int(m.group(1)) % self.sets), 1), name)
        if alias not in self.shared:
            self.shared[alias] = self._drawn(spec)
        return replace(self.shared[alias], name=name)

    def _drawn(self, spec: TensorSpec) -> Weight:
        form = spec.formats[0]
        if form is I64:
            return Weight(spec.name, spec.shape, I64, self._expert_ids(spec))
        if form in (BF16, F32):
            mean, std = next(
                (v for end, v in _SPREAD.items() if spec.name.endswith(end)), (0.0, spec.shape[-1] ** -0.5)
            )
            dtype = torch.bfloat16 if form is BF16 else torch.float32
            data = torch.empty(spec.shape, dtype=dtype, device=self.device).normal_(mean, std)
            return Weight(spec.name, spec.shape, form, data)
        return Weight(spec.name, spec.shape, form, self._codes(spec, form), self._scales(spec, form))

    def _codes(self, spec: TensorSpec, form: WeightFormat) -> Tensor:
        shape = form.stored_shape(spec.shape)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        if form is MXFP4:
            return codes
        return codes.masked_fill_((codes & 127) == 127, 0)  # the codes of NaN

    def _scales(self, spec: TensorSpec, form: WeightFormat) -> Tensor:
        """One power of two for all, so that a product has about the variance of what it is of."""
        wanted = spec.shape[-1] ** -0.5 / (_E2M1_RMS if form is MXFP4 else _E4M3_RMS)
        exponent = round(torch.tensor(wanted).log2().item())
        shape = form.scale_shape(spec.shape)
        assert shape is not None
        if form is FP8_BLOCK_F32:
            return torch.full(shape, 2.0**exponent, device=self.device)
        assert form in (FP8_BLOCK, MXFP4)
        return torch.full(shape, 127 + exponent, dtype=torch.uint8, device=self.device)

    def _expert_ids(self, spec: TensorSpec) -> Tensor:
        """Distinct experts for each token id."""
        lines, topk = spec.shape
        first = torch.randint(0, self.config.n_routed_experts, (lines, 1), device=self.device)
        step = self.config.n_routed_experts // topk
        return (first + step * torch.arange(topk, device=self.device)) % self.config.n_routed_experts

    @property
    def bytes_shared(self) -> int:
        return sum(weight.format.bytes_of(weight.shape) for weight in self.shared.values())


def dummy_engine(config: ModelConfig, sets: int, memory_bytes: int) -> tuple[Engine, Ops, Dummies]:
    """An engine on the GPU backend whose weights never were in a file."""
    name, operations = ops.select("triton", exact=False)
    device = ops.device_of(operations)
    dummies = Dummies(config, device, sets)
    model = build(config, Binder(dummies.take, operations, False, exact=False, device=device))
    used = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    budget = Budget(memory_bytes, used, used, streamed=False, on_gpu=True)
    decoder = Decoder(config, model, operations, False, device)
    engine = Engine(config, model, backend=name, exact=False, budget=budget, device=device, decoder=decoder)
    return engine, operations, dummies
