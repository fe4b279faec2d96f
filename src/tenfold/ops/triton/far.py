"""Routed experts in host memory, for models that a card cannot hold: kernels read them across the bus where they lie.

A bank of experts is a table of addresses, so a copy on the card takes over when one line of the table changes. `rest`,
between two passes, copies the busiest experts on a stream of its own, while passes go on; the next `rest` changes their
lines. A slot is filled only after its last expert's line is back where that expert lies. Knows no layers.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tenfold.errors import DoesNotFit
from tenfold.ops import Experts, Weight

__all__ = ["FarExperts"]

_ARENA_BYTES = 1 << 30
_ALIGN = 256
_PASSES = 32
"""Between two looks at what is busy: a look waits for the device."""
_MOST_MOVES = 4
"""Experts of a layer copied at a time."""
_PORTABLE_AND_MAPPED = 1 | 2
"""To cudaHostRegister: every context sees the memory, and kernels may read it."""
_SAME_ADDRESS = 91
"""The driver's number of the attribute: kernels reach registered host memory at the host's own address."""
_FORGET = 0.5
"""What a count is worth at the next look."""


@dataclass(slots=True, eq=False)
class _Bank:
    """A layer's experts: where each lies, how often it was chosen, and who is in which slot of the card."""

    table: Tensor  # int64 [experts, 6], what kernels read
    home: Tensor  # the same in host memory, as it was at first
    sources: list[list[Tensor]]  # of each expert the six tensors that the table names
    counts: Tensor
    slots: Tensor  # uint8 [hot, bytes of an expert]
    holder: list[int]  # the expert in each slot, -1 for none
    coming: list[int] = field(default_factory=list)  # slots that are being filled


class FarExperts:
    """All experts in host memory of one model; `hot` of each layer are copied to the card."""

    def __init__(self, device: torch.device, hot: int) -> None:
        self.device, self.hot = device, hot
        if device.type == "cuda":
            _check_addresses(torch.cuda.current_device())
        self._room = torch.empty(0, dtype=torch.uint8)
        self._arenas: list[Tensor] = []
        self._banks: WeakKeyDictionary[Experts, _Bank] = WeakKeyDictionary()
        self._passes = 0
        self._aside: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def keep(self, weight: Weight) -> Weight:
        """The weight in memory that the card can read across the bus."""
        scale = None if weight.scale is None else self._kept(weight.scale)
        return Weight(weight.name, weight.shape, weight.format, self._kept(weight.data), scale)

    def _kept(self, tensor: Tensor) -> Tensor:
        padded = -(-tensor.nbytes // _ALIGN) * _ALIGN
        if padded > self._room.shape[0]:
            self._room = torch.empty(max(padded, _ARENA_BYTES), dtype=torch.uint8)
            self._arenas.append(self._room)
            if self.device.type == "cuda":
                # Not torch's pinned memory, which rounds every tensor up to a power of two.
                register = torch.cuda.cudart().cudaHostRegister
                failed = register(self._room.data_ptr(), self._room.nbytes, _PORTABLE_AND_MAPPED)
                if int(failed):
                    raise DoesNotFit(
                        f"{self._room.nbytes} bytes of host memory for experts could not be pinned ({failed}); raise "
                        "the limit of locked memory (ulimit -l), or use --backend cpu"
                    )
        found = self._room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._room = self._room[padded:]
        found.copy_(tensor)
        return found

    def seen(self, bank: Experts, table: Tensor, ids: Tensor) -> None:
        """Counts who was chosen, on the device."""
        found = self._banks.get(bank)
        if found is None:
            found = self._banks[bank] = self._entered(bank, table)
        flat = ids.flatten()
        found.counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))

    def _entered(self, bank: Experts, table: Tensor) -> _Bank:
        sources = [
            [tensor for w in triple for tensor in (w.data, w.data if w.scale is None else w.scale)]
            for triple in zip(bank.w1, bank.w2, bank.w3, strict=True)
        ]
        each = sum(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in sources[0])
        hot = min(self.hot, len(sources))
        return _Bank(
            table=table,
            home=table.cpu().clone(),
            sources=sources,
            counts=torch.zeros(len(sources), device=self.device),
            slots=torch.empty(hot, each, dtype=torch.uint8, device=self.device),
            holder=[-1] * hot,
        )

    def rest(self) -> None:
        """After a pass and before the next."""
        self._passes += 1
        if self.hot and self._passes % _PASSES == 0:
            self.look()

    def look(self) -> None:
        """Experts that have come take their lines; others, busier than some that are there, set out."""
        if self._aside is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._aside)
        for bank in self._banks.values():
            for slot in bank.coming:
                bank.table[bank.holder[slot]] = self._line(bank, slot).to(self.device)
            bank.coming = []
            moves = _moves(bank)
            for slot, _ in moves:
                if bank.holder[slot] >= 0:
                    bank.table[bank.holder[slot]] = bank.home[bank.holder[slot]].to(self.device)
            bank.counts *= _FORGET
            self._set_out(bank, moves)

    def _line(self, bank: _Bank, slot: int) -> Tensor:
        address, line = bank.slots[slot].data_ptr(), []
        for tensor in bank.sources[bank.holder[slot]]:
            line.append(address)
            address += -(-tensor.nbytes // _ALIGN) * _ALIGN
        return torch.tensor(line, dtype=torch.int64)

    def _set_out(self, bank: _Bank, moves: list[tuple[int, int]]) -> None:
        if self._aside is not None:
            self._aside.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self._aside is None else torch.cuda.stream(self._aside):
            for slot, expert in moves:
                start = 0
                for tensor in bank.sources[expert]:
                    octets = tensor.view(torch.uint8).flatten()
                    bank.slots[slot, start : start + octets.shape[0]].copy_(octets, non_blocking=True)
                    start += -(-octets.shape[0] // _ALIGN) * _ALIGN
                bank.holder[slot] = expert
                bank.coming.append(slot)


def _check_addresses(ordinal: int) -> None:
    """A table of host addresses would be memory that is not there on a card which sees it elsewhere."""
    found = ctypes.c_int(0)
    failed = ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(found), _SAME_ADDRESS, ordinal)
    if failed or not found.value:
        raise DoesNotFit(
            "the weights do not fit this GPU, and it cannot read host memory at the host's own addresses, as on "
            "Windows; use --backend cpu, or a larger card"
        )


def _moves(bank: _Bank) -> list[tuple[int, int]]:
    """(slot, expert): the busiest that have no slot, each for an empty slot or one of a less busy expert."""
    counts = bank.counts.cpu().tolist()
    inside = set(bank.holder)
    outside = sorted((e for e in range(len(counts)) if e not in inside and counts[e]), key=lambda e: -counts[e])
    slots = sorted(range(len(bank.holder)), key=lambda s: -1.0 if bank.holder[s] < 0 else counts[bank.holder[s]])
    moves = []
    for slot, expert in list(zip(slots, outside, strict=False))[:_MOST_MOVES]:
        if bank.holder[slot] < 0 or counts[expert] > counts[bank.holder[slot]]:
            moves.append((slot, expert))
    return moves
