"""Fleets against the published table of pools, step times and costs, to its last digit."""

from __future__ import annotations

import pytest

from tenfold.checkpoint import grouped
from tenfold.config import preset
from tenfold.errors import UsageError
from tenfold.planner import dissect
from tenfold.planner.machines import find, known
from tenfold.planner.serving import Fleet, usd_per_million

# sequences a device, those that fit, step ms, memory/compute/floor ms, tokens/s a device and a user, $/M out and in
POOLS = """
v4-pro   32 H200 8192    119  1124 49.8 19.4/21.3/9.2 2388  20 0.465  0.259
v4-pro   32 H200 131072  86   106  49.8 21.5/19.2/9.2 1727  20 0.644  0.302
v4-pro   32 H200 1000000 14   14   38.2 21.5/7.5/9.2  367   26 3.029  0.546
v4-pro   32 B200 8192    355  1668 50.0 13.0/27.8/9.1 7103  20 0.215  0.156
v4-pro   32 B200 131072  157  157  38.2 14.5/14.6/9.1 4106  26 0.372  0.177
v4-pro   32 B200 1000000 21   21   27.2 13.9/4.1/9.1  773   37 1.977  0.288
v4-pro   32 B300 8192    355  2924 49.9 13.0/27.8/9.2 7109  20 0.254  0.184
v4-pro   32 B300 131072  262  276  49.9 16.8/23.9/9.1 5248  20 0.344  0.207
v4-pro   32 B300 1000000 37   37   32.1 16.1/6.8/9.1  1153  31 1.566  0.324
v4-flash 16 H100 8192    635  1220 50.0 12.6/30.9/6.4 12711 20 0.059  0.047
v4-flash 16 H100 131072  113  113  26.8 12.3/8.0/6.5  4221  37 0.178  0.059
v4-flash 16 H100 1000000 15   15   21.7 11.8/3.5/6.4  690   46 1.087  0.143
v4-flash 8  H200 8192    647  2254 50.0 12.0/31.5/6.4 12944 20 0.086  0.069
v4-flash 8  H200 131072  209  209  35.4 14.0/14.9/6.5 5909  28 0.188  0.087
v4-flash 8  H200 1000000 28   28   26.4 13.5/6.5/6.5  1060  38 1.048  0.211
v4-flash 8  B200 8192    1592 3048 50.0 9.8/33.7/6.4  31851 20 0.048  0.041
v4-flash 8  B200 131072  283  283  23.8 9.5/7.8/6.4   11905 42 0.128  0.049
v4-flash 8  B200 1000000 38   38   18.3 9.1/2.8/6.4   2072  55 0.737  0.098
v3.2     32 H200 8192    99   219  49.8 18.5/22.1/9.1 1990  20 0.558  0.311
v3.2     32 H200 131072  13   13   32.9 18.5/5.2/9.1  395   30 2.810  0.467
v3.2     32 H200 1000000 1    1    24.4 13.6/1.7/9.1  41    41 27.160 1.443
v3.2     32 B200 8192    254  308  50.0 15.9/25.0/9.1 5082  20 0.301  0.188
v3.2     32 B200 131072  19   19   25.0 12.5/3.3/9.1  759   40 2.013  0.282
v3.2     32 B200 1000000 2    2    21.5 10.9/1.5/9.1  93    47 16.399 0.873
"""


def fleet(model: str, count: int, machine: str) -> Fleet:
    config = preset(model)
    tables = sum(spec.formats[0].bytes_of(spec.shape) for spec, _ in grouped(config) if spec.active == 0.0)
    return Fleet(dissect(config), find(machine), count, tables)


@pytest.mark.parametrize("line", POOLS.strip().splitlines())
def test_pools(line: str) -> None:
    model, count, machine, context, *printed = line.split()
    pool, tokens = fleet(model, int(count), machine), int(context)
    batch = pool.best_batch(tokens)
    step, price = pool.step(tokens, batch), pool.hardware.usd_per_hour or 0
    found = [str(batch), str(pool.fit(tokens)), f"{1e3 * step.seconds:.1f}",
             f"{1e3 * step.memory_s:.1f}/{1e3 * step.compute_s:.1f}",
             f"{batch / step.seconds:.0f}", f"{1 / step.seconds:.0f}",
             f"{usd_per_million(price, step.seconds / batch):.3f}",
             f"{usd_per_million(price, pool.prefill_s(tokens) / tokens):.3f}"]  # fmt: skip
    parts, _, floor = printed[3].rpartition("/")
    assert found == [*printed[:3], parts, *printed[4:]]
    assert 1e3 * step.floor_s == pytest.approx(float(floor), abs=0.0501)  # 9.15 and 6.45 are printed either way


def test_a_model_that_does_not_fit_has_no_batch() -> None:
    pool = fleet("v4-pro", 1, "H100")
    assert pool.room_bytes < 0
    assert pool.fit(4096) == pool.best_batch(4096) == 0


def test_missing_units_run_at_the_next_wider_rate() -> None:
    assert find("H200").peak("fp4") == find("H200").peak("fp8") == 2 * find("H200").peak("bf16") + 1e12
    assert find("m3 ultra").peak("fp4") == find("M3-Ultra").peak("f32")


def test_every_machine_says_where_its_figures_come_from() -> None:
    assert all(hardware.source and hardware.memory_bytes > 0 for hardware in known().values())


def test_an_unknown_machine_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean RTX-5090"):
        find("rtx5090")
    with pytest.raises(UsageError, match="Known are this, H100"):
        find("abacus")
