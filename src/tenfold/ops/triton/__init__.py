"""The GPU backend: every operation as Triton kernels, from Ampere on. Knows nothing of layers.

What the files agree on:

- Functions have the signature and the meaning of their namesakes in `ops/reference.py`; those whose numerics
  depend on `exact` take `parts` beside: 1 rounds activations to bf16 before a matrix product, 3 multiplies them
  as they are, in three bf16 terms (`lowp.mm_split`). Activations are float32 on the way in and out.
- Tensors live on one device: cuda, or cpu in the interpreter. New ones come from
  `x.new_empty` or `device=x.device`.
- No function reads a tensor's contents on the host, and shapes follow from shapes alone, so a step can be captured
  in a CUDA graph. (So `select_rows` has min(topk, rows of keys) columns, -1 at the end.)
- Kernels touch low-precision numbers through `lowp` alone; every format decision is a `tl.constexpr`.
- In the interpreter time goes by the number of operations, not by their size: `lowp.INTERPRET` chooses large tiles.
"""

from __future__ import annotations

import torch

from tenfold.ops import Weight
from tenfold.ops.triton.lowp import INTERPRET

__all__ = ["Triton"]


class Triton:
    """The operations on one device. `exact` multiplies activations unrounded."""

    def __init__(self, *, exact: bool) -> None:
        self.device = torch.device("cpu" if INTERPRET else "cuda")
        self.parts = 3 if exact else 1

    def prepare(self, weight: Weight, resident: bool) -> Weight:
        """The weight as it is stored, on the device."""
        scale = None if weight.scale is None else weight.scale.to(self.device)
        return Weight(weight.name, weight.shape, weight.format, weight.data.to(self.device), scale)
