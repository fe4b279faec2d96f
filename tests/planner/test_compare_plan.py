"""`tenfold compare` and `tenfold plan`: their figures, their refusals, and how fast they answer without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tenfold import terminal
from tenfold.cli import app
from tenfold.planner import machines
from tenfold.planner.machines import Measured, store_measured
from tenfold.planner.prices import Price, Workload, hosted_usd, parse_tokens, parse_workload


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is as the test measured it, not as its user did; tables keep their width."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(terminal.out, "width", 200)


def run(*words: str) -> str:
    outcome = CliRunner().invoke(app, [*words])
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def refused(*words: str) -> str:
    outcome = CliRunner().invoke(app, [*words])
    assert outcome.exit_code == 2, outcome.output
    return " ".join(outcome.output.split())


def asked(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json"))
    return found


def test_compare_puts_claimed_beside_computed() -> None:
    found = asked("compare")
    claims = [(c["model"], f"{c['claimed']:.2f}", f"{100 * c['computed']:.1f}") for c in found["claims"]]
    assert claims == [("v4-pro", "0.27", "27.1"), ("v4-pro", "0.10", "10.5"),
                      ("v4-flash", "0.10", "10.2"), ("v4-flash", "0.07", "7.3")]  # fmt: skip
    flops = {model["name"]: f"{model['flops']['fp8_equivalent'] / 1e9:.1f}" for model in found["models"]}
    assert flops == {"v3.2": "1146.1", "v4-flash": "116.6", "v4-pro": "310.3"}
    assert {m["name"]: m["price"]["miss"] for m in found["models"]} == {"v3.2": 0.28, "v4-flash": 0.14, "v4-pro": 1.74}
    assert [m["name"] for m in found["models"] if m["hypothetical"]] == ["v3.2"]


def test_compare_says_what_is_often_told_wrong() -> None:
    text = run("compare")
    assert "27.08 %" in text
    assert "v3.2 37.5 B of 671.9 B" in text
    assert "102 % of its FLOPs" in text
    assert "25 %" in text


def test_compare_by_component_and_why() -> None:
    assert "999.42" in run("compare", "--by", "component")
    text = run("compare", "v4-pro", "--why")
    assert "+435.2" in text
    assert "-2.9 %" in text
    assert "3.05 TFLOP more" in text


def test_a_changed_field_is_a_column_of_its_own() -> None:
    models = asked("compare", "v4-pro", "--set", "index_topk=2048")["models"]
    assert [model["name"] for model in models] == ["v3.2", "v4-pro", "v4-pro, index_topk=2048"]
    assert f"{models[2]['flops']['fp8_equivalent'] / 1e9:.1f}" == "326.4"


def test_a_folder_can_be_compared() -> None:
    models = asked("compare", "tiny-v4-flash", "--against", "tiny-v4-flash", "--context", "1K")["models"]
    assert [model["kv_bytes_per_token"] for model in models] == [pytest.approx(168.0625)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("compare", "v5"), "no config.json at v5"),
        (("compare", "--context", "1.5X"), "expected a number of tokens such as 4096, 128K, 1M or 1Mi"),
        (("compare", "--context", "0"), "the nearest is 1"),
        (("compare", "--context", "2M"), "the longest is v4-flash's 1,048,576"),
        (("compare", "--by", "layer"), "expected component"),
        (("compare", "--set", "index_topkk=4"), "the nearest field is index_topk"),
        (("compare", "--set", "index_topk=many"), "expected a number or JSON"),
        (("compare", "v4-pro", "--against", "v4-flash", "--why"), "use --against v3.2"),
        (("plan", "v3.2", "--machine", "H200", "--context", "1M"), "the longest is --context 163840"),
        (("plan", "v4-pro", "--machine", "H20"), "did you mean H200"),
        (("plan", "v4-pro", "--machine", "H200", "--gpus", "0"), "the nearest is 1"),
        (("plan", "v4-pro", "--machine", "H200", "--price", "1/-2/3"), "the nearest is 1/2/3"),
        (("plan", "v4-pro", "--machine", "H200", "--price", "cheap"), "HIT/MISS/OUTPUT"),
        (("plan", "v4-pro", "--machine", "H200", "--hourly", "-4"), "the nearest is 4"),
        (("plan", "v4-pro", "--machine", "H200", "--utilisation", "2"), "at most 1"),
        (("plan", "v4-pro", "--machine", "H200", "--workload", "reed it"), "expected words such as"),
        (("plan", "v4-pro", "--context", "1.5X"), "expected a number of tokens such as 4096, 128K, 1M or 1Mi"),
        (("plan", "v4-pro", "--context", "2M"), "the longest is --context 1048576"),
    ],
)
def test_bad_input_gets_one_sentence_with_a_way_out(words: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(*words)


def test_an_unreadable_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "is not JSON" in refused("compare", str(tmp_path))


def test_plan_on_a_fleet() -> None:
    found = asked("plan", "v4-flash", "--machine", "h200", "--gpus", "8", "--context", "1M")
    assert found["memory"]["mode"] == "resident"
    assert found["memory"]["longest_context"] == 1_048_576
    assert found["batch"]["sequences_each"] == 28
    assert f"{found['money']['usd_per_million_out']:.3f}" == "1.048"
    assert found["time"]["binding"] == "launch floor"


def test_plan_says_how_many_devices_it_takes() -> None:
    found = asked("plan", "v4-pro", "--machine", "RTX-PRO-6000", "--context", "1M")
    assert found["memory"]["mode"] == "does not fit"
    assert found["time"] is found["money"] is None
    least = found["memory"]["least_devices"]
    modes = [asked("plan", "v4-pro", "--machine", "RTX-PRO-6000", "--context", "1M", "--gpus", str(n))["memory"]["mode"]
             for n in (least - 1, least)]  # fmt: skip
    assert modes == ["does not fit", "resident"]
    assert f"--gpus {least}" in run("plan", "v4-pro", "--machine", "RTX-PRO-6000", "--context", "1M")
    assert asked("plan", "v4-pro", "--machine", "RTX-5090")["memory"]["least_devices"] is None


def test_the_longest_context_fits_and_the_next_does_not() -> None:
    words = ("plan", "v4-flash", "--machine", "DGX-Spark", "--gpus", "2")
    longest = asked(*words)["memory"]["longest_context"]
    found = [asked(*words, "--context", str(tokens))["memory"] for tokens in (longest, longest - 4096)]
    assert all(memory["mode"] == "resident" and memory["longest_context"] == longest for memory in found)


def measured(**other: Any) -> Measured:
    speeds = {"read_bytes_per_s": 30e9, "float32_flops_per_s": 200e9, "int8_ops_per_s": 500e9, "disk_bytes_per_s": 1e9}
    speeds |= {"float_product_flops_per_s": 200e9, "fp8_product_flops_per_s": 200e9}
    speeds |= {"int8_product_ops_per_s": 400e9, "attention_ops_per_s": 250e9, "index_ops_per_s": 500e9}
    floors = {
        "layer_floor_s": 1e-4,
        "token_floor_s": 1e-6,
        "key_floor_s": 1e-9,
        "key_tile_s": 1e-9,
        "base_bytes": 300_000_000,
    }
    figures: dict[str, Any] = {**speeds, **floors, "cpu_model": "test", "threads": 2, "measured_on": "2026-11-24"}
    return Measured(**figures | other)


def test_plan_on_this_machine_from_its_own_figures() -> None:
    store_measured(measured())
    assert machines.measured() == measured()
    found = asked("plan", "tiny-v4-flash", "--context", "1K")
    assert found["memory"]["mode"] == "resident"
    slower = {}
    for name in ("read_bytes_per_s", "float_product_flops_per_s", "layer_floor_s"):
        store_measured(measured(**{name: getattr(measured(), name) * (10 if name == "layer_floor_s" else 0.1)}))
        slower[name] = asked("plan", "tiny-v4-flash", "--context", "1K")["time"]["tokens_per_s"]
    assert all(speed < found["time"]["tokens_per_s"] for speed in slower.values())


def test_attention_of_many_heads_to_v4_rows_has_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    store_measured(measured())
    here = replace(machines.find("this"), memory_bytes=1e12)
    monkeypatch.setattr(machines, "_here", lambda: here)
    speeds: dict[str, list[float]] = {"tiny-v4-flash": [], "v4-flash": [], "v3.2": []}
    for rate in (250e9, 25e9):
        store_measured(measured(attention_ops_per_s=rate))
        for model, found in speeds.items():
            found.append(asked("plan", model, "--context", "64K")["time"]["first_token_s"])
    assert speeds["v4-flash"][1] > 1.2 * speeds["v4-flash"][0]
    assert speeds["tiny-v4-flash"][0] == speeds["tiny-v4-flash"][1]
    assert speeds["v3.2"][0] == speeds["v3.2"][1]


def test_experts_that_memory_does_not_hold_come_from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    store_measured(measured())
    here = replace(machines.find("this"), memory_bytes=40e9)
    monkeypatch.setattr(machines, "_here", lambda: here)
    found = asked("plan", "v4-flash", "--context", "64K")
    assert found["memory"]["mode"] == "experts from disk"
    assert 0.7 < found["memory"]["streamed_share"] < 1
    assert found["time"]["binding"] == "disk"
    assert "routed experts read from disk" in run("plan", "v4-flash", "--context", "64K")


def test_figures_of_another_version_count_as_none() -> None:
    store_measured(measured())
    machines.measured_path().write_text('{"read_bytes_per_s": 1}', encoding="utf-8")
    assert machines.measured() is None


def test_a_workload_here_and_hosted() -> None:
    words = ("plan", "v4-pro", "--machine", "B200", "--gpus", "8", "--context", "1M", "--price", "1/2/3")
    found = asked(*words, "--workload", "read 900K once, ask 10 x 1K, answer 200")["workload"]
    assert (found["read"], found["asks"], found["question"], found["answer"]) == (921_600, 10, 1024, 200)
    assert 15 < found["read_s"] < 30
    assert found["own_usd"] == pytest.approx((found["read_s"] + found["ask_s"]) / 3600 * 5.5 * 8)


def test_the_workload_of_the_manual_fits() -> None:
    """Fifty questions of one text are fifty forks of it, not one session longer than the model holds."""
    words = ("plan", "v4-flash", "--machine", "H200", "--gpus", "8", "--context", "1M")
    found = asked(*words, "--workload", "read 1M once, ask 50 x 1K")["workload"]
    assert found["ask_s"] < 50 * found["read_s"]
    assert Workload(1_000_000, 50, 1024, 1024).context == 1_002_048


def test_a_machine_that_was_not_measured_tells_memory_and_no_times() -> None:
    found = asked("plan", "tiny-v4-flash", "--context", "4K")
    assert found["memory"]["mode"] == "resident"
    assert found["time"] is found["money"] is found["machine"]["read_bytes_per_s"] is None
    assert "tenfold doctor --measure" in run("plan", "tiny-v4-flash", "--context", "4K")


def test_a_hosted_bill_worked_by_hand() -> None:
    """100 read with the first question, 100 of the cache for the second; 10 new and 5 written each."""
    price = Price("", "", "", hit=1e6, miss=100e6, output=10_000e6, source="")
    assert hosted_usd(Workload(100, 2, 10, 5), price) == 120 * 100 + 100 + 10 * 10_000


WRITTEN = {"4096": 4096, "4K": 4096, "1M": 1_000_000, "1Mi": 1_048_576, "1,000": 1000, "0.5M": 500_000}


@pytest.mark.parametrize(("text", "tokens"), list(WRITTEN.items()))
def test_tokens_as_people_write_them(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


def test_workloads_as_people_write_them() -> None:
    assert parse_workload("read 1M once, ask 50 x 1K") == Workload(1_000_000, 50, 1024, 1024)
    assert parse_workload("Read 4K, ask 2x100 answer 7") == Workload(4096, 2, 100, 7)
    assert parse_workload("read 128K") == Workload(131_072)


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from tenfold.cli import app\n"
        "for words in (['compare', '--why'], ['plan', 'v4-pro', '--machine', 'H200', '--gpus', '32']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0, words\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_gpu_keeps_the_weights_as_published_and_a_cpu_unpacks_one() -> None:
    """V3.2's kv_b_proj: 61 layers of 128 heads x (128 + 128) x 512, a byte each or four."""
    on_gpu, on_cpu = (
        asked("plan", "v3.2", "--context", "4K", "--machine", machine)["memory"]["weights"]["other"]
        for machine in ("H200", "EPYC-9755")
    )
    assert 3 * 61 * 128 * 256 * 512 >= on_cpu - on_gpu > 2.99 * 61 * 128 * 256 * 512
