"""ggml's matrix products through ctypes, on the same weights: its blocks made of ours, as they lie or repacked by ggml.

Reads libggml-base and libggml-cpu from the folder that llama-cpp-python installs them in (llama_cpp/lib). Knows
nothing of what is compared.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from tenfold.formats import MXFP4
from tenfold.ops import Weight, reference

__all__ = ["Ggml", "Product"]

F32, Q8_0, MXFP4_TYPE = 0, 8, 39
BLOCK = 32
ARENA_BYTES = 1 << 22


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_BASE = {
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
}
_CPU = {
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_cpu_has_avx512": (c_int,),
}


class Ggml:
    """The libraries, and a CPU backend with `threads` threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        try:
            base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
            cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
            log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
            self._silent = log(lambda level, text, data: None)
            base.ggml_log_set(self._silent, None)
        except OSError as exc:
            raise SystemExit(
                f"{folder} has no libggml-base.so and libggml-cpu.so ({exc}); give the folder llama_cpp/lib of an "
                "installed llama-cpp-python built with GGML_NATIVE=ON and GGML_OPENMP=ON"
            ) from exc
        for library, functions in ((base, _BASE), (cpu, _CPU)):
            for name, (result, *arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self.build = "AVX-512" if self.cpu_has_avx512() else "AVX2"
        """What it was compiled for: with GGML_NATIVE=ON the best that this machine has."""
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, threads)

    def repack_type(self) -> int | None:
        """The buffer type that rearranges weights as they are stored, if this build has one."""
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        found = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.backend_reg_dev_get(registry, 0))
        for place in range(16):
            if not found[place]:
                return None
            if b"REPACK" in self.backend_buft_name(found[place]):
                return int(found[place])
        return None


class Product:
    """x times each of some matrices, as one graph of ggml."""

    def __init__(self, ggml: Ggml, weights: Sequence[Weight], x: Tensor, repacked: bool) -> None:
        self.ggml = ggml
        rows, columns = weights[0].shape
        self.shape = len(weights), x.shape[0], rows
        kind = MXFP4_TYPE if weights[0].format is MXFP4 else Q8_0
        self.stored, self.computed = (ggml.init(_InitParams(ARENA_BYTES, None, True)) for _ in range(2))
        matrices = [ggml.new_tensor_2d(self.stored, kind, columns, rows) for _ in weights]
        self.buffers = [self._allocate(repacked)]
        blocks = mxfp4_blocks if kind == MXFP4_TYPE else q8_0_blocks
        self.num_bytes = 0
        for matrix, weight in zip(matrices, weights, strict=True):
            packed = blocks(weight)
            self.num_bytes += packed.nbytes
            ggml.backend_tensor_set(matrix, packed.data_ptr(), 0, packed.nbytes)
        given = ggml.new_tensor_2d(self.computed, F32, columns, x.shape[0])
        self.outs = [ggml.mul_mat(self.computed, matrix, given) for matrix in matrices]
        self.graph = ggml.new_graph(self.computed)
        for out in self.outs:
            ggml.build_forward_expand(self.graph, out)
        self.buffers.append(ggml.backend_alloc_ctx_tensors(self.computed, ggml.backend))
        x = x.contiguous()
        ggml.backend_tensor_set(given, x.data_ptr(), 0, x.nbytes)

    def _allocate(self, repacked: bool) -> int:
        if not repacked:
            return int(self.ggml.backend_alloc_ctx_tensors(self.stored, self.ggml.backend))
        kind = self.ggml.repack_type()
        if kind is None:
            raise SystemExit("this build of ggml does not repack weights; build it with GGML_CPU_REPACK=ON")
        return int(self.ggml.backend_alloc_ctx_tensors_from_buft(self.stored, kind))

    def run(self) -> None:
        code = self.ggml.backend_graph_compute(self.ggml.backend, self.graph)
        assert code == 0, f"ggml answered {code}"

    def result(self) -> Tensor:
        """float32 [matrices, n, out] of the last run."""
        found = torch.empty(self.shape)
        for out, place in zip(self.outs, found, strict=True):
            self.ggml.backend_tensor_get(out, place.data_ptr(), 0, place.nbytes)
        return found

    def free(self) -> None:
        for buffer in self.buffers:
            self.ggml.backend_buffer_free(buffer)
        for context in (self.stored, self.computed):
            self.ggml.free(context)


def mxfp4_blocks(weight: Weight) -> Tensor:
    """Our codes as ggml's blocks: the scale, then 16 bytes with element j low and element j + 16 high."""
    assert weight.scale is not None
    codes = weight.data.view(torch.uint8).unflatten(1, (-1, BLOCK // 2))
    elements = torch.stack([codes & 15, codes >> 4], -1).flatten(2)  # [out, blocks, 32]
    nibbles = elements[:, :, : BLOCK // 2] | (elements[:, :, BLOCK // 2 :] << 4)
    return torch.cat([weight.scale.view(torch.uint8)[:, :, None], nibbles], 2).contiguous()


def q8_0_blocks(weight: Weight) -> Tensor:
    """The nearest that ggml has to fp8: a float16 scale, then 32 int8, rounded from the weight's values."""
    blocks = reference.dequantize(weight).unflatten(1, (-1, BLOCK))
    scale = (blocks.abs().amax(2, keepdim=True) / 127).half()
    codes = (blocks / scale.float().clamp(min=1e-30)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], 2).contiguous()
