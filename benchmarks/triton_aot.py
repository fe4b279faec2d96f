"""Compiles the GPU kernels at the widths of V4-Flash and V3.2 for Ampere to Blackwell, and reads the machine code.

Needs no GPU. For each kernel and architecture: registers, stack (spills), shared memory and matrix instructions, to
results/triton-aot.csv. `--kernel` and `--arch` choose some, whose lines there are replaced; `--json` prints instead.
Says nothing of speed, and nothing of a kernel's results: those the interpreter checks (tests/ops/triton).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before anything imports triton

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tenfold.formats import RowLayout, index_key_fp4, index_key_fp8, kv_row_v4, kv_row_v32
from tenfold.ops.triton import attention, compress, experts, hyper, index, latent, linear, route, rows, sessions, topk

RESULTS = Path(__file__).parent / "results" / "triton-aot.csv"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHS = (80, 89, 90, 100, 120)
SHARED_LIMIT_KB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory a block may have, by architecture."""
PITCHES = ("pitch", "stride")
"""Numbers that are multiples of 16 in every launch."""
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "QMMA", "OMMA")

HIDDEN, INNER, EXPERTS, TOPK, LATENT, HEAD = 4096, 2048, 256, 6, 1024, 512
HIDDEN_V32, TOPK_V32 = 7168, 8


@dataclass(frozen=True)
class Case:
    """A kernel as it would be launched: types of its arguments, its constants, warps and stages."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """What came out; `matrix` counts matrix instructions, `wide_loads` those of 16 bytes among the global loads."""

    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix: str
    wide_loads: int
    loads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--names", action="store_true", help="only list the kernels, and check how they are launched")
    chosen = parser.parse_args()
    for case in cases():
        check_numbers(case)
        if chosen.names:
            print(case.name)
    if chosen.names:
        return
    found = []
    for case in cases():
        for arch in chosen.arch if chosen.kernel in case.name else ():
            found.append(compiled(case, arch))
            print(found[-1], file=sys.stderr, flush=True)
    if chosen.json:
        print(json.dumps([asdict(one) for one in found]))
        return
    record(found)


def record(found: list[Compiled]) -> None:
    """The table with these lines in place of older ones, in the order of the cases."""
    names = [field.name for field in fields(Compiled)]
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            lines = {(line["kernel"], line["arch"]): line for line in csv.DictReader(file)}
    lines |= {(one.kernel, str(one.arch)): asdict(one) for one in found}
    places = {(case.name, str(arch)): i for i, (case, arch) in enumerate(itertools.product(cases(), ARCHS))}
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines[key] for key in sorted(lines.keys() & places.keys(), key=places.__getitem__))


# ---------------------------------------------------------------------------------------------- what is compiled


def cases() -> Iterator[Case]:
    yield from linear_cases()
    yield from expert_cases()
    yield from other_cases()
    yield from attention_cases()
    yield from index_cases()
    yield from session_cases()


def linear_cases() -> Iterator[Case]:
    types = {"x": "*fp32", "norm": "*fp32", "eps": "fp32", "before": "*fp32", "codes": "*u8", "scale": "*u8",
             "out": "*fp32", "n": "i32", "N": "i32", "wide": "i32"}  # fmt: skip
    stored = {"f32": ("*fp32", "*fp32"), "bf16": ("*bf16", "*bf16"), "fp8": ("*u8", "*u8"),
              "fp8-f32scale": ("*u8", "*fp32"), "mxfp4": ("*u8", "*u8")}  # fmt: skip
    for n, parts in ((1, 1), (1, 3), (33, 1), (4096, 1)):
        for form, (name, (codes, scale)) in enumerate(stored.items()):
            t = linear.tiles(n, HIDDEN, 1 << form)
            given = types | {"codes": codes, "scale": scale}
            if n > 16 and name != "f32":
                given |= {"x": "*bf16"}
            constants = {"NORMED": False, "ADDED": False, "GROUPS": 1, "ROW": HIDDEN, "K": HIDDEN, "FORMAT": form,
                         "PARTS": parts, **sizes(t)}  # fmt: skip
            yield Case(f"linear {name}, {n} rows, {parts} parts", linear.linear_kernel, given, constants, **t.options)
        types_each = {"x": "*fp32" if n == 1 else "*bf16", "norm": "*fp32", "eps": "fp32", "table": "*i64",
                      "out": "*fp32", "n": "i32"}  # fmt: skip
        t = linear.tiles(n, HIDDEN, 2 | 4)
        constants = {"NORMED": False, "COUNT": 8, "K": HIDDEN, "FORMATS": 2 | 4, "PARTS": parts, **sizes(t)}
        name = f"linear_each fp8 and bf16, {n} rows, {parts} parts"
        yield Case(name, linear.linear_each_kernel, types_each, constants, **t.options)
        if n == 1:
            normed = constants | {"NORMED": True, "COUNT": 2, "FORMATS": 4, "K": LATENT}
            yield Case(f"norm and {name}", linear.linear_each_kernel, types_each, normed, **t.options)
    yield from latent_linear_cases(types, types_each | {"x": "*fp32"})


def latent_linear_cases(types: dict[str, str], types_each: dict[str, str]) -> Iterator[Case]:
    """Of a token of V3.2: the norm before a layer's products, the sum behind them, the absorbed ones by head."""
    fp8, bf16 = linear.AS_FP8_F32.value, linear.AS_BF16.value
    scaled, plain = types | {"scale": "*fp32"}, types | {"codes": "*bf16", "scale": "*bf16"}
    t = linear.tiles(1, HIDDEN_V32, 1 << fp8)
    shape = {"NORMED": False, "ADDED": False, "GROUPS": 1, "PARTS": 1, **sizes(t)}
    each = {"NORMED": True, "COUNT": 4, "K": HIDDEN_V32, "FORMATS": 1 << fp8 | 1 << bf16, "PARTS": 1, **sizes(t)}
    yield Case("norm and linear_each v3.2", linear.linear_each_kernel, types_each, each, **t.options)
    onto = shape | {"ADDED": True, "ROW": 16384, "K": 16384, "FORMAT": fp8}
    yield Case("linear onto what was there", linear.linear_kernel, scaled, onto, **t.options)
    gate = shape | {"NORMED": True, "ROW": HIDDEN_V32, "K": HIDDEN_V32, "FORMAT": bf16, "PARTS": 3}
    yield Case("norm and linear of the router", linear.linear_kernel, plain, gate, **t.options)
    heads = shape | {"GROUPS": 128, "ROW": 192, "K": 128, "FORMAT": fp8}
    yield Case("linear by head, of wider rows", linear.linear_kernel, scaled, heads, **t.options)


def expert_cases() -> Iterator[Case]:
    pointers = {"x": "*fp32", "norm": "*fp32", "weights": "*fp32", "table": "*i64", "ids": "*i64", "order": "*i32",
                "blocks": "*i32", "out": "*bf16"}  # fmt: skip
    numbers = dict.fromkeys(("n", "num_blocks", "inner", "shared_inner", "hidden"), "i32")
    numbers |= dict.fromkeys(("limit", "eps"), "fp32")
    shared = {"shared_table": "*i64", "shared_out": "*bf16"}
    fp8, mxfp4 = linear.AS_FP8.value, linear.AS_MXFP4.value
    for rows_each, direct in ((1, True), (1, False), (33, False), (96, False)):
        choices = {"TOPK": TOPK, "EXPERTS": EXPERTS, "DIRECT": direct}
        label = "one token" if direct else f"{rows_each} rows an expert"
        t = linear.tiles(rows_each, HIDDEN, 4 | 16)
        t = replace(t, n=min(t.n, 64))
        types = pointers | numbers | shared | ({} if rows_each == 1 else {"x": "*bf16"})
        if direct:
            types |= {"order": "*i64", "blocks": "*i64"}
        constants = choices | {"NORMED": False, "K": HIDDEN, "LIMITED": True, "PARTS": 1, "FORMAT": mxfp4,
                               "SHARED_FORMAT": fp8}  # fmt: skip
        yield Case(f"gate_up, {label}", experts.gate_up_kernel, types, constants | sizes(t), **t.options)
        if rows_each == 1:
            form = linear.AS_FP8_F32.value
            t_v32 = linear.tiles(1, HIDDEN_V32, 1 << form)
            normed = constants | {"NORMED": True, "TOPK": TOPK_V32, "K": HIDDEN_V32, "LIMITED": False, "FORMAT": form,
                                  "SHARED_FORMAT": form} | sizes(t_v32)  # fmt: skip
            yield Case(f"norm and gate_up v3.2, {label}", experts.gate_up_kernel, types, normed, **t_v32.options)
        types = types | {"gated": "*bf16", "shared_gated": "*bf16", "out": "*fp32"}
        constants = choices | {"LINES": TOPK + 1, "K": INNER, "SHARED_K": INNER, "PARTS": 1, "FORMAT": mxfp4,
                               "SHARED_FORMAT": fp8}  # fmt: skip
        yield Case(f"down, {label}", experts.down_kernel, types, constants | sizes(t), **t.options)
    types = {"ids": "*i64", "counts": "*i32", "order": "*i32", "blocks": "*i32", "pairs": "i32", "num_blocks": "i32"}
    bins = {"EXPERTS": EXPERTS, "BINS": 2 * EXPERTS, "CHUNK": 256}
    for alone in (True, False):
        name = "plan, one chunk" if alone else "plan, many chunks"
        yield Case(name, experts.plan_kernel, types, bins | {"BM": 16, "ALONE": alone, "SLAB": 16})
    yield Case("plan, counts", experts.count_kernel, types, bins)
    types = {"y": "*fp32", "before": "*fp32", "out": "*fp32", "numbers": "i32", "hidden": "i32"}
    adding = {"ADDED": False, "LINES": TOPK + 1, "BLOCK": 1024}
    yield Case("sum of experts", experts.sum_kernel, types, adding)
    yield Case("sum of experts v3.2", experts.sum_kernel, types, adding | {"ADDED": True, "LINES": TOPK_V32 + 1})


def other_cases() -> Iterator[Case]:
    pointers = ("streams", "fn", "flat", "logits", "squares", "scale", "base", "norm", "x", "post", "combination", "y",
                "out", "merged", "bias", "weights", "weight", "frequencies", "values", "gates", "table")  # fmt: skip
    numbers = (
        "n",
        "per_split",
        "splits",
        "rows",
        "each",
        "entries",
        "stride_group",
        "stride_token",
        "stride_row",
        "lines",
    )
    types = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(numbers, "i32")
    types |= dict.fromkeys(("norm_eps", "eps", "scaling"), "fp32") | {
        "ids": "*i64",
        "positions": "*i64",
        "packed": "*u8",
    }
    project = {"TILES": 2, "M": 4, "D": HIDDEN, "OUTPUTS": 24, "BO": 32, "BM": 16, "BK": 128}
    for name, parts in (("", 0), (" after attention", 1), (" after experts", TOPK + 1)):
        sizes_of = project | {"PARTS": parts, "BK": 64 if parts else 128}
        warps, stages = (8, 1) if parts else (4, 3)
        yield Case(f"hyper project{name}", hyper.project_kernel, types, sizes_of, warps, stages)
    finish = {"M": 4, "BS": 4, "D": HIDDEN, "BD": HIDDEN, "BT": 1, "OUTPUTS": 24, "SPLITS": 64, "ITERATIONS": 20}
    yield Case("hyper finish", hyper.finish_kernel, types, finish, num_warps=8)
    yield Case("hyper collapse", hyper.finish_kernel, types, finish | {"OUTPUTS": 4, "ITERATIONS": 0}, num_warps=8)
    yield Case("hyper merge", hyper.merge_kernel, types, {"M": 4, "D": HIDDEN, "PARTS": 1, "BD": 1024, "BT": 1})
    choose = {"BIASED": True, "TOPK": TOPK, "BK": 8, "BT": 1, "SOFTPLUS": True}
    one = {"GROUPS": 1, "BG": 1, "EACH": EXPERTS, "BE": EXPERTS, "TOPK_GROUP": 1}
    eight = {"GROUPS": 8, "BG": 8, "EACH": 32, "BE": 32, "TOPK_GROUP": 4, "SOFTPLUS": False, "TOPK": 8}
    yield Case("route", route.choose_kernel, types, choose | one)
    yield Case("route, groups", route.choose_kernel, types, choose | eight)
    weigh = {"EXPERTS": EXPERTS, "TOPK": TOPK, "BK": 8, "BT": 1, "SOFTPLUS": True}
    yield Case("route, chosen", route.weigh_kernel, types, weigh)
    pool = {"RATIO": 4, "DIM": HEAD, "OVERLAP": True, "BR": 8, "BD": 256, "BE": 1}
    yield Case("compress by 4", compress.compress_kernel, types, pool)
    pool = {"RATIO": 128, "DIM": HEAD, "OVERLAP": False, "BR": 128, "BD": 32, "BE": 1}
    yield Case("compress by 128", compress.compress_kernel, types, pool)
    look = {"WIDTH": HIDDEN, "BW": 1024, "BT": 1}
    yield Case("embed", compress.embed_kernel, types | {"table": "*bf16"}, look)
    yield from row_cases(types)


def row_cases(types: dict[str, str]) -> Iterator[Case]:
    names = ("CODED", "BITS", "BLOCK", "SCALES", "SCALE_BYTES", "PLAIN_AT", "SCALE_AT", "ROW_BYTES", "LIMIT", "FLOOR")
    nothing = {
        "NORM": False,
        "WEIGHTED": False,
        "PAIRS": 0,
        "SPREAD": False,
        "FINISH": 0,
        "WIDTH": HEAD,
        "BW": HEAD,
        "BR": 4,
    }
    nothing |= dict(zip(names, rows._format(None, HEAD), strict=True))
    norm = nothing | {"NORM": True, "WEIGHTED": True}
    yield Case("rms_norm of hidden", rows.turn_kernel, types, norm | {"WIDTH": HIDDEN, "BW": HIDDEN, "BR": 1})
    yield Case("norm_rope", rows.turn_kernel, types, norm | {"PAIRS": 32, "WEIGHTED": False})
    for layout, spread in (
        (kv_row_v4(512, 64), 0),
        (kv_row_v32(512, 64), 0),
        (index_key_fp4(128), 1),
        (index_key_fp8(128), 1),
    ):
        width, height = rows._block(layout.width, 64, rows.Steps(spread=bool(spread)))
        shape = {"WIDTH": layout.width, "BW": width, "BR": height, "SPREAD": bool(spread)}
        shape |= dict(zip(names, rows._format(layout, width), strict=True)) | {"PAIRS": 32}
        packing = types | {"out": "*u8"}
        yield Case(f"norm_rope_pack {layout.name}", rows.turn_kernel, packing, norm | shape | {"FINISH": 2})
        if spread:
            yield Case(f"rope_round {layout.name}", rows.turn_kernel, types, nothing | shape | {"FINISH": 1})
        constants = {name: shape[name] for name in (*names[:3], *names[4:8], "WIDTH", "BW", "BR")}
        yield Case(f"unpack_rows {layout.name}", rows.unpack_kernel, types, constants)
    turn = {"PAIRS": 32, "BP": 32, "BR": 16, "INVERSE": False, "INTERLEAVED": True}
    yield Case("rope", rows.rope_kernel, types, turn)
    yield Case("layer_norm", rows.layer_norm_kernel, types | {"bias": "*fp32"}, {"WIDTH": 128, "BW": 128, "BR": 16})


def attention_cases() -> Iterator[Case]:
    """One query of many sessions in parts, and many queries whole; the window beside a list, and a list alone."""
    pointers = dict.fromkeys(("q", "out", "lse", "sinks", "frequencies", "partial"), "*fp32") | {"positions": "*i64"}
    numbers = dict.fromkeys(("stride_a", "columns_a", "stride_b", "columns_b", "splits"), "i32") | {"scale": "fp32"}
    kinds: tuple[tuple[str, RowLayout, int, int, int], ...] = (
        ("v4", kv_row_v4(512, 64), 64, 1, 2),
        ("v3.2", kv_row_v32(512, 64), 128, 2, 0),
    )
    for name, layout, heads, first, second in kinds:
        v4 = name == "v4"
        common = {"H": heads, "PAIRS": 32 if v4 else 0, "VALUES": HEAD, "HAS_SINK": v4}
        for many in (False, True):
            rows_type, list_type = "*u8" if many else "*i64", "*i32"
            types = pointers | numbers | {"rows_a": rows_type, "rows_b": rows_type}
            types |= dict.fromkeys(("start_a", "stop_a"), "*i64" if first == 1 else list_type)
            types |= dict.fromkeys(("start_b", "stop_b"), list_type)
            shape = attention._sizes(layout, layout.width, HEAD) | common
            heads_each = attention._heads_each(heads, 4096 if many else 1)
            constants = shape | {"FIRST": first, "SECOND": second, "FIRST_EACH": not many, "SECOND_EACH": not many,
                                 "WHOLE": many, "BH": heads_each, "BK": attention._rows_each(layout.width)}  # fmt: skip
            label = f"attention {name}, {'many queries' if many else 'a query of each session'}"
            yield Case(label, attention._attend, types, constants, num_warps=8, num_stages=1)
        merge = common | {"MAIN": shape["MAIN"], "LANES": 32}
        yield Case(f"merge of attention {name}", attention._merge, pointers | numbers, merge)


def index_cases() -> Iterator[Case]:
    types = {"q": "*bf16", "weights": "*fp32", "visible": "*i64", "out": "*fp32", "bins": "*i32", "n": "i32",
             "pitch": "i32", "factor": "fp32"}  # fmt: skip
    for layout in (index_key_fp4(128), index_key_fp8(128)):
        shape = {"CODE_BITS": layout.code_bits, "ROW_BYTES": layout.row_bytes, "SCALE_OFFSET": layout.scale_offset,
                 "SCALE_BYTES": layout.scale_bytes, "BLOCK": layout.block, "H": 64, "HP": 64, "D": 128, "DP": 128,
                 "BN": index._KEYS}  # fmt: skip
        for each in (True, False):
            given = types | {"keys": "*i64" if each else "*u8"}
            constants = shape | {"EMPTIED": topk._BINS, "EACH": each, "QUERIES": 1 if each else index._QUERIES}
            label = f"index scores {layout.name}, {'a query of each session' if each else 'many queries'}"
            yield Case(label, index._scores, given, constants)
    types = dict.fromkeys(("bins", "counts", "out"), "*i32") | {"scores": "*fp32", "visible": "*i64"}
    types |= dict.fromkeys(("n", "stride", "width"), "i32")
    blocks = {"ALL": topk._BINS, "BLOCK": topk._BLOCK}
    yield Case("top-k at once", topk._search, types, {"BR": 1, "BN": topk._AT_ONCE}, num_warps=8)
    for level in range(3):
        yield Case(f"top-k, histogram {level}", topk._count_bins, types, blocks | {"LEVEL": level})
    yield Case("top-k, counts", topk._count_taken, types, blocks)
    yield Case("top-k, writing", topk._write_taken, types, blocks | {"BLOCKS": 128})


def session_cases() -> Iterator[Case]:
    types = {"rows": "*u8", "addresses": "*i64", "places": "*i64"}
    yield Case("store a row each", sessions._store, types, {"ROW_BYTES": 584, "RING": 128, "WIDE": 1024}, num_warps=1)
    types = dict.fromkeys(("values", "gates", "ape", "norm", "frequencies"), "*fp32") | {"eps": "fp32"}
    types |= dict.fromkeys(("states", "rows", "positions"), "*i64")
    for name, layout, ratio, overlap, spread in (
        ("csa", kv_row_v4(512, 64), 4, True, False),
        ("hca", kv_row_v4(512, 64), 128, False, False),
        ("keys", index_key_fp4(128), 4, True, True),
    ):
        yield Case(f"compress a token each, {name}", sessions._compress, types,
                   {"RATIO": ratio, "OVERLAP": overlap, **sessions.sizes(layout, spread, 32)})  # fmt: skip
    types |= {f"key_{name}": types[name] for name in ("values", "gates", "ape", "states", "norm")}
    types |= {"row": "*fp32", "row_norm": "*fp32", "rings": "*i64", "keys": "*i64"}
    types |= dict.fromkeys(("q", "queries", "q_index"), "*fp32") | {"met": "*bf16"}
    rows_sizes = sessions.sizes(kv_row_v4(512, 64), False, 32)
    keys_sizes = {f"KEY_{name}": size for name, size in sessions.sizes(index_key_fp4(128), True, 32).items()}
    for name, groups, ratio in (("csa", 2, 4), ("hca", 1, 128), ("window", 0, 1)):
        constants = {"RING": 128, "GROUPS": groups, "RATIO": ratio, "OVERLAP": groups == 2, "HEADS": 64,
                     "BH": sessions._HEADS, "INDEX_HEADS": 64 if groups == 2 else 0, "BI": sessions._INDEX_HEADS,
                     **rows_sizes, **keys_sizes}  # fmt: skip
        given = types | ({} if groups == 2 else {"met": "*fp32"})
        yield Case(f"enter a token each, {name}", sessions._enter, given, constants)
    types |= dict.fromkeys(("key", "key_norm", "key_bias"), "*fp32")
    constants = {"HEADS": 128, "QUERY": 192, "LATENT": 512, "INDEX_HEADS": 64, "BI": latent._INDEX_HEADS,
                 "BH": latent._HEADS, **sessions.sizes(kv_row_v32(512, 64), False, 32)}  # fmt: skip
    keys_sizes = {f"KEY_{name}": size for name, size in sessions.sizes(index_key_fp8(128), True, 32).items()}
    yield Case("enter a token each, v3.2", latent._enter_latent, types, constants | keys_sizes)


def sizes(t: linear.Tiles) -> dict[str, int]:
    return {"BM": t.m, "BN": t.n, "BK": t.k}


# ---------------------------------------------------------------------------------------------- compiling


def compiled(case: Case, arch: int) -> Compiled:
    """The case compiled as a launch would, with memory aligned to 16 bytes."""
    names = case.kernel.arg_names
    types = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if types[name].startswith("*") or (name in PITCHES and name not in case.constants)}  # fmt: skip
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    source = ASTSource(case.kernel, types, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = read("cuobjdump", "-res-usage", file.name), read("nvdisasm", "-c", file.name)
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in MATRIX_INSTRUCTIONS}
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.\S*", code)
    return Compiled(
        case.name,
        arch,
        number(r"REG:(\d+)", usage),
        number(r"STACK:(\d+)", usage),
        made.metadata.shared,
        " ".join(f"{name}:{count}" for name, count in counts.items() if count),
        sum("128" in re.sub("LTC128B", "", load) for load in loads),
        len(loads),
    )


def check_numbers(case: Case) -> None:
    """A count that a launch specialises would be another kernel, one that was not compiled here, and in the middle of
    a text: for 1, for multiples of 16 and for the rest. Pitches alone are multiples of 16 always."""
    for parameter in case.kernel.params:
        name = parameter.name
        if name not in case.constants and case.types[name].startswith("i") and name not in PITCHES:
            assert parameter.do_not_specialize, f"{case.name}: {name} is specialised"


def read(tool: str, *words: str) -> str:
    return subprocess.run([TOOLS / tool, *words], capture_output=True, text=True, check=True).stdout


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text}"
    return int(found[1])


if __name__ == "__main__":
    main()
