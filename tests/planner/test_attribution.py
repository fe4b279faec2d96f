"""Shares of the saving, one-at-a-time variants and baselines: the published tables to their last digit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.planner.test_work import LENGTHS

from tenfold.config import PRESETS, preset
from tenfold.errors import UsageError
from tenfold.planner import Anatomy, dissect
from tenfold.planner.attribution import FLOPS_CAUSES, KV_CAUSES, flops_shares, kv_shares, shapley
from tenfold.planner.memory import kv_by_component, kv_bytes, kv_bytes_per_token, kv_fixed_bytes
from tenfold.planner.variants import UNDONE, all_experts, dense_mla, gqa8, with_attention_of, without_absorption
from tenfold.planner.work import NO_FP4, RAW, step_work, total_flops

V32, PRO, FLASH = (dissect(preset(name)) for name in ("v3.2", "v4-pro", "v4-flash"))
M = 1_000_000


def gflop(model: Anatomy, length: int) -> float:
    return total_flops(step_work(model, length - 1, 1)) / 1e9


# GFLOP saved and share: CSA, fp4, hybrid, top-k, heads, backbone, depth
FLOPS_AT_1M = {
    "v4-pro": "+435.2 +52.1% +248.8 +29.8% +146.7 +17.6% +23.1 +2.8% +6.5 +0.8% -24.6 -2.9%",
    "v4-flash": "+384.2 +37.3% +222.5 +21.6% +164.0 +15.9% +24.7 +2.4% +43.9 +4.3% +48.7 +4.7% +141.4 +13.7%",
}
KV_AT_1M = {
    "v4-pro": "+24.834 +57.73% +14.063 +32.70% +2.196 +5.11% +1.944 +4.52% -0.024 -0.05%",
    "v4-flash": "+21.651 +48.61% +12.560 +28.20% +1.963 +4.41% +1.739 +3.90% -0.019 -0.04% +6.645 +14.92%",
}
# CSA, hybrid, fp4, top-k, heads, backbone, depth
FLOPS_BY_LENGTH = """
v4-pro   4K   +16.0  +21.3  +1.0   +12.1 +2.3 -24.6
v4-pro   32K  +14.3  +27.7  +8.2   +23.1 +2.7 -24.6
v4-pro   128K +57.0  +39.8  +32.6  +23.1 +3.1 -24.6
v4-pro   512K +228.2 +88.2  +130.5 +23.1 +4.6 -24.6
v4-pro   1M   +435.2 +146.7 +248.8 +23.1 +6.5 -24.6
v4-flash 4K   +12.8  +12.8  +0.9   +18.3 +15.8 +48.7 +8.5
v4-flash 32K  +12.6  +19.0  +7.3   +24.7 +18.5 +48.7 +13.2
v4-flash 128K +50.4  +33.7  +29.2  +24.7 +21.1 +48.7 +26.2
v4-flash 512K +201.4 +92.7  +116.7 +24.7 +31.4 +48.7 +78.4
v4-flash 1M   +384.2 +164.0 +222.5 +24.7 +43.9 +48.7 +141.4
"""
MODELS = {"v4-pro": PRO, "v4-flash": FLASH}


@pytest.mark.parametrize("name", FLOPS_AT_1M)
def test_shares_of_the_flops(name: str) -> None:
    found = {share.cause: share for share in flops_shares(V32, MODELS[name], M)}
    order = [found[text] for text in FLOPS_CAUSES.values() if text in found]
    printed = [text for s in order for text in (f"{s.saved / 1e9:+.1f}", f"{100 * s.share:+.1f}%")]
    assert printed == FLOPS_AT_1M[name].split()
    whole = gflop(V32, M) - gflop(MODELS[name], M)
    assert sum(share.saved for share in order) / 1e9 == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", KV_AT_1M)
def test_shares_of_the_memory(name: str) -> None:
    found = {share.cause: share for share in kv_shares(V32, MODELS[name], M)}
    order = [found[text] for text in KV_CAUSES.values() if text in found]
    printed = [text for s in order for text in (f"{s.saved / 1e9:+.3f}", f"{100 * s.share:+.2f}%")]
    assert printed == KV_AT_1M[name].split()
    whole = kv_bytes(V32, M) - kv_bytes(MODELS[name], M)
    assert sum(share.saved for share in order) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("line", FLOPS_BY_LENGTH.strip().splitlines())
def test_shares_by_length(line: str) -> None:
    name, length, *printed = line.split()
    found = {share.cause: share.saved for share in flops_shares(V32, MODELS[name], LENGTHS[length])}
    keys = ("csa", "hybrid", "fp4", "topk", "heads", "backbone", "depth")
    assert [f"{found[FLOPS_CAUSES[key]] / 1e9:+.1f}" for key in keys if FLOPS_CAUSES[key] in found] == printed


def test_raw_shares_of_pro() -> None:
    found = {s.cause: f"{100 * s.share:.0f}%" for s in flops_shares(V32, PRO, M, RAW)}
    keys = ("csa", "hybrid", "topk", "backbone")
    assert [found[FLOPS_CAUSES[key]] for key in keys] == ["69%", "32%", "1%", "-3%"]


def test_shapley_values_of_a_game_worked_by_hand() -> None:
    """a saves 3 alone, b saves 1 alone, together they save 6: each gets half of the 2 they save as a pair."""
    costs = {frozenset(): 10.0, frozenset("a"): 7.0, frozenset("b"): 9.0, frozenset("ab"): 4.0}
    assert shapley(("a", "b"), costs.__getitem__) == {"a": 4.0, "b": 2.0}


# Pro GF, of V3.2; Flash GF, of V3.2; KV of Pro and Flash, of V3.2
UNDONE_AT_1M = """
371.8 32.4% 159.6 13.9% 11.5% 8.0%
494.7 43.2% 245.7 21.4% 41.0% 28.7%
263.5 23.0% 123.7 10.8% 20.7% 14.6%
638.3 55.7% 387.9 33.8% 82.8% 58.3%
326.4 28.5% 125.1 10.9% 10.5% 7.3%
285.7 24.9% 165.3 14.4% 10.5% 7.3%
310.3 27.1% 116.6 10.2% 20.5% 14.3%
310.3 27.1% 161.9 14.1% 10.5% 7.3%
"""


@pytest.mark.parametrize(("undo", "line"), list(zip(UNDONE, UNDONE_AT_1M.strip().splitlines(), strict=True)))
def test_one_thing_undone(undo: str, line: str) -> None:
    pro, flash = UNDONE[undo](PRO, V32), UNDONE[undo](FLASH, V32)
    base, base_kv = gflop(V32, M), kv_bytes(V32, M)
    found = [text for model in (pro, flash)
             for text in (f"{gflop(model, M):.1f}", f"{100 * gflop(model, M) / base:.1f}%")]  # fmt: skip
    # the published column leaves the compressor's state out
    stateless = (kv_bytes(model, M) - kv_by_component(model, M)["state"] for model in (pro, flash))
    found += [f"{100 * value / base_kv:.1f}%" for value in stateless]
    assert found == line.split()


def test_what_the_backbone_and_the_experts_do() -> None:
    base = gflop(V32, M)
    swapped = [f"{100 * gflop(with_attention_of(model, V32), M) / base:.1f}" for model in (PRO, FLASH)]
    assert swapped == ["102.2", "95.8"]
    attention_only = [f"{100 * gflop(with_attention_of(V32, model), M) / base:.1f}" for model in (PRO, FLASH)]
    assert attention_only == ["24.9", "14.4"]
    dense = {name: gflop(all_experts(model), M) for name, model in (("v3.2", V32), ("flash", FLASH), ("pro", PRO))}
    added = [f"{(dense[name] - gflop(model, M)) / 1e3:.2f} {dense[name] / gflop(model, M):.1f}"
             for name, model in (("v3.2", V32), ("flash", FLASH), ("pro", PRO))]  # fmt: skip
    assert added == ["1.27 2.1", "0.54 5.6", "3.05 10.8"]
    assert f"{100 * dense['pro'] / dense['v3.2']:.0f}" == "139"
    assert f"{100 * total_flops(step_work(PRO, M - 1, 1), NO_FP4) / 1e9 / base:.0f}" == "32"


# GF: V3.1, V3.2, V3.2/V3.1, GQA8, V3.2/GQA8, Pro/V3.1, Pro/GQA8; GB: V3.1, V3.2, GQA8; V3.2/GQA8, Pro, Flash (43)
BASELINES = """
4K   214   151  70.3% 108  139.5% 57.20% 113.54% 0.16  0.20  1.02   19.2% 4.29% 4.13%
8K   354   155  43.8% 141  110.0% 34.91% 87.68%  0.33  0.39  2.05   19.2% 3.15% 3.06%
16K  632   163  25.8% 206  79.0%  19.78% 60.59%  0.66  0.79  4.09   19.2% 2.58% 2.53%
32K  1189  179  15.1% 337  53.2%  10.78% 37.98%  1.31  1.58  8.19   19.2% 2.30% 2.26%
64K  2302  212  9.2%  599  35.4%  5.83%  22.40%  2.62  3.15  16.37  19.2% 2.16% 2.13%
128K 4529  278  6.1%  1123 24.7%  3.24%  13.05%  5.24  6.30  32.75  19.2% 2.08% 2.06%
256K 8983  409  4.5%  2171 18.8%  1.91%  7.89%   10.49 12.60 65.50  19.2% 2.05% 2.03%
512K 17891 671  3.7%  4267 15.7%  1.23%  5.17%   20.98 25.20 131.00 19.2% 2.03% 2.01%
1M   34056 1146 3.4%  8071 14.2%  0.91%  3.85%   40.02 48.07 249.86 19.2% 2.02% 2.00%
1Mi  35706 1195 3.3%  8459 14.1%  0.89%  3.78%   41.96 50.40 261.99 19.2% 2.02% 2.00%
"""


@pytest.mark.parametrize("line", BASELINES.strip().splitlines())
def test_against_dense_mla_and_gqa8(line: str) -> None:
    length, *printed = line.split()
    tokens = LENGTHS[length]
    v31, v32, gqa, pro = (gflop(model, tokens) for model in (dense_mla(V32), V32, gqa8(V32), PRO))
    kv = [kv_bytes(model, tokens) / 1e9 for model in (dense_mla(V32), V32, gqa8(V32), PRO, FLASH)]
    found = [f"{v31:.0f}", f"{v32:.0f}", f"{100 * v32 / v31:.1f}%", f"{gqa:.0f}", f"{100 * v32 / gqa:.1f}%"]
    found += [f"{100 * pro / v31:.2f}%", f"{100 * pro / gqa:.2f}%", *(f"{value:.2f}" for value in kv[:3])]
    found += [f"{100 * kv[1] / kv[2]:.1f}%", f"{100 * kv[3] / kv[2]:.2f}%"]
    found += [f"{100 * kv[4] / (kv[2] * FLASH.layers / V32.layers):.2f}%"]
    assert found == printed


@pytest.mark.parametrize(
    ("length", "printed"), [("4K", "0.377"), ("8K", "0.922"), ("32K", "7.712"), ("128K", "95.236"), ("1M", "5068.734")]
)
def test_prefill_of_dense_mla_in_full_heads(length: str, printed: str) -> None:
    model = without_absorption(dense_mla(V32), 192, 128)
    assert f"{total_flops(step_work(model, 0, LENGTHS[length])) / 1e15:.3f}" == printed


# MB of V3.2, Pro, Flash; ratios; Pro and Flash without state; KV read a step, ratios
KV_BY_LENGTH = """
4K   196.9   43.9   29.8   22.3% 15.1% 12.8% 8.9% 21.9% 9.9%
8K   393.8   64.5   44.2   16.4% 11.2% 11.6% 8.1% 18.8% 8.9%
16K  787.5   105.7  73.0   13.4% 9.3%  11.0% 7.7% 15.5% 7.9%
32K  1575.1  188.1  130.6  11.9% 8.3%  10.8% 7.5% 12.7% 7.0%
64K  3150.2  353.0  245.7  11.2% 7.8%  10.6% 7.4% 10.7% 6.4%
128K 6300.4  682.8  476.0  10.8% 7.6%  10.5% 7.4% 9.5%  6.0%
256K 12600.7 1342.2 936.7  10.7% 7.4%  10.5% 7.3% 8.8%  5.8%
512K 25201.5 2661.2 1857.9 10.6% 7.4%  10.5% 7.3% 8.5%  5.7%
1M   48068.0 5054.7 3529.7 10.5% 7.3%  10.5% 7.3% 8.3%  5.6%
1Mi  50403.0 5299.1 3700.4 10.5% 7.3%  10.5% 7.3% 8.3%  5.6%
"""


@pytest.mark.parametrize("line", KV_BY_LENGTH.strip().splitlines())
def test_memory_by_length(line: str) -> None:
    length, *printed = line.split()
    tokens = LENGTHS[length]
    base, pro, flash = (kv_bytes(model, tokens) for model in (V32, PRO, FLASH))
    stateless = [kv_bytes(model, tokens) - kv_by_component(model, tokens)["state"] for model in (PRO, FLASH)]
    reads = [sum(w.kv_bytes for w in step_work(model, tokens - 1, 1)) for model in (V32, PRO, FLASH)]
    found = [f"{value / 1e6:.1f}" for value in (base, pro, flash)]
    found += [f"{100 * value / base:.1f}%" for value in (pro, flash, *stateless)]
    found += [f"{100 * value / reads[0]:.1f}%" for value in reads[1:]]
    assert found == printed


def with_bytes(model: Anatomy, row: int, key: int) -> Anatomy:
    """Rows of another layout, and no compressor state."""
    kinds = tuple(
        replace(k, row_bytes=row, index_row_bytes=key if k.index_heads else 0, state_bytes=0) for k in model.attention
    )
    return replace(model, attention=kinds)


# bytes of V3.2's row and key, V4's row and key; GB of V3.2, Pro, Flash; ratios; times smaller
LAYOUTS = """
656  132 584  68  1M  48.07 5.036 3.517 10.48% 7.32% 9.54 13.67
656  132 584  68  1Mi 50.40 5.280 3.688 10.48% 7.32% 9.55 13.67
640  128 576  64  1M  46.85 4.944 3.453 10.55% 7.37% 9.48 13.57
640  128 576  64  1Mi 49.12 5.184 3.621 10.55% 7.37% 9.48 13.57
1152 256 1024 256 1M  85.89 9.856 6.886 11.48% 8.02% 8.71 12.47
1152 256 1024 256 1Mi 90.06 10.334 7.220 11.47% 8.02% 8.71 12.47
656  132 584  132 1M  48.07 5.516 3.853 11.48% 8.02% 8.71 12.47
656  132 584  132 1Mi 50.40 5.784 4.040 11.47% 8.02% 8.71 12.47
"""


@pytest.mark.parametrize("line", LAYOUTS.strip().splitlines())
def test_which_layout_gives_10_and_7_percent(line: str) -> None:
    row, key, row4, key4, length, *printed = line.split()
    models = (with_bytes(V32, int(row), int(key)), *(with_bytes(m, int(row4), int(key4)) for m in (PRO, FLASH)))
    base, pro, flash = (kv_bytes(model, LENGTHS[length]) for model in models)
    found = [f"{base / 1e9:.2f}", f"{pro / 1e9:.3f}", f"{flash / 1e9:.3f}"]
    found += [f"{100 * pro / base:.2f}%", f"{100 * flash / base:.2f}%", f"{base / pro:.2f}", f"{base / flash:.2f}"]
    assert found == printed


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 127, 128, 4096, 163_840, M])
def test_memory_is_that_of_the_streams(name: str, tokens: int) -> None:
    config = preset(name)
    expected = {component: count for component, count in config.kv_bytes(tokens).items() if count}
    assert kv_by_component(dissect(config), tokens) == expected


def test_memory_is_a_fixed_and_a_growing_part() -> None:
    assert [f"{kv_bytes_per_token(model) / 1e3:.3f}" for model in (V32, FLASH, PRO)] == ["48.068", "3.514", "5.031"]
    assert kv_fixed_bytes(V32) == 0
    assert f"{kv_by_component(PRO, 0)['state'] / 1e6:.1f}" == "18.7"
    assert kv_fixed_bytes(FLASH) == kv_bytes(FLASH, 3)


def test_only_v4_is_explained_and_only_against_v32() -> None:
    with pytest.raises(UsageError, match="architecture, not"):
        flops_shares(FLASH, PRO, M)
    with pytest.raises(UsageError, match="compare v4-pro"):
        kv_shares(V32, V32, M)
