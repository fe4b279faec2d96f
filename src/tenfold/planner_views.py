"""How plans and comparisons look on a terminal. Computes no figure of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenfold.terminal import bytes_text, duration_text, out, table

__all__ = ["show_by_component", "show_comparison", "show_plan", "show_why"]


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.1f}"


def context_text(tokens: int) -> str:
    """4K, 128K, 1M, 1Mi, as they are typed."""
    if tokens == 1 << 20:
        return "1Mi"
    for size, unit in ((1_000_000, "M"), (1024, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def show_comparison(found: Mapping[str, Any]) -> None:
    """The table people quote, the claims beside it, and what is often told wrong."""
    models, base = found["models"], found["against"]
    columns = ("", *(model["name"] + (" *" if model["hypothetical"] else "") for model in models))
    rows = [
        ("parameters, B", *(f"{m['parameters']['total'] / 1e9:,.1f}" for m in models)),
        ("active, B", *(f"{m['parameters']['active'] / 1e9:,.1f}" for m in models)),
        ("GFLOP a token (fp8-equivalent)", *(_giga(m["flops"]["fp8_equivalent"]) for m in models)),
        (f"  of {base}", *(_percent(m["ratio"]["flops"]) for m in models)),
        ("  raw FLOPs", *(_percent(m["ratio"]["flops_raw"]) for m in models)),
        ("  without fp4 units", *(_percent(m["ratio"]["flops_no_fp4"]) for m in models)),
        ("KV cache", *(bytes_text(m["kv_bytes"]) for m in models)),
        (f"  of {base}", *(_percent(m["ratio"]["kv"]) for m in models)),
        ("  a further token", *(bytes_text(m["kv_bytes_per_token"]) for m in models)),
        ("KV bytes read a token", *(bytes_text(m["kv_read_bytes"]) for m in models)),
        (f"  of {base}", *(_percent(m["ratio"]["kv_read"]) for m in models)),
        ("prefill, PFLOP", *(f"{m['prefill_flops'] / 1e15:,.3f}" for m in models)),
        (f"  of {base}", *(_percent(m["ratio"]["prefill"]) for m in models)),
        ("$ / M input at launch", *(f"{m['price']['miss']:.2f}" if m["price"] else "n/a" for m in models)),
    ]
    out.print(table(f"At {context_text(found['context'])} = {found['context']:,} tokens", columns, rows))
    if found["claims"]:
        claims = [
            (f"{c['model']}: {c['what']}", f"{100 * c['claimed']:.0f} %", f"{100 * c['computed']:.2f} %")
            for c in found["claims"]
        ]
        out.print()
        out.print(table("Claimed and computed, at 1,000,000 tokens", ("", "claimed", "computed"), claims))
    out.print()
    for note in found["notes"]:
        out.print(f"- {note}", soft_wrap=True)
    if any(model["hypothetical"] for model in models):
        out.print("* beyond the context the model was made for", soft_wrap=True)
    out.print(f"FLOPs: {found['definitions']['flops']}.", soft_wrap=True)


def show_by_component(found: Mapping[str, Any]) -> None:
    """FLOPs, raw and weighed, and KV bytes of each component."""
    models = found["models"]
    names = list(dict.fromkeys(name for m in models for name in m["flops"]["by_component"]))
    columns = ("component", *(f"{m['name']} {kind}" for m in models for kind in ("raw", "fp8-eq")))
    rows = [
        (name, *(_component(m, name, kind) for m in models for kind in ("raw_by_component", "by_component")))
        for name in names
    ]
    totals = (f"{m['flops'][kind] / 1e9:,.1f}" for m in models for kind in ("raw", "fp8_equivalent"))
    out.print(table(f"GFLOP a token at {found['context']:,} tokens", columns, [*rows, ("total", *totals)]))
    names = list(dict.fromkeys(name for m in models for name in m["kv_by_component"]))
    rows = [(name, *(bytes_text(m["kv_by_component"].get(name, 0)) for m in models)) for name in names]
    total = ("total", *(bytes_text(m["kv_bytes"]) for m in models))
    out.print()
    out.print(table("KV cache", ("component", *(m["name"] for m in models)), [*rows, total]))


def _component(model: Mapping[str, Any], name: str, kind: str) -> str:
    value = model["flops"][kind].get(name)
    return "-" if value is None else f"{value / 1e9:,.2f}"


def show_why(found: Mapping[str, Any]) -> None:
    """Shares of the saving in FLOPs and in KV, and one thing undone at a time."""
    model, base, at = found["model"], found["against"], f"{found['context']:,} tokens"
    flops, kv = found["flops"], found["kv"]
    out.print(
        table(
            f"Why {model} needs {_giga(flops['to'])} and not {base}'s {_giga(flops['from'])} GFLOP a token at {at}",
            ("cause", "GFLOP saved", "share of saving"),
            [(s["cause"], f"{s['saved'] / 1e9:+,.1f}", f"{100 * s['share']:+.1f} %") for s in flops["shares"]],
        )
    )
    out.print()
    out.print(
        table(
            f"Why it keeps {bytes_text(kv['to'])} and not {bytes_text(kv['from'])}",
            ("cause", "GB saved", "share of saving"),
            [(s["cause"], f"{s['saved'] / 1e9:+,.3f}", f"{100 * s['share']:+.2f} %") for s in kv["shares"]],
        )
    )
    out.print()
    rows = [
        (u["variant"], _giga(u["flops"]), _percent(u["of_flops"]), bytes_text(u["kv_bytes"]), _percent(u["of_kv"]))
        for u in found["undone"]
    ]
    columns = ("one thing undone", "GFLOP", f"of {base}", "KV", f"of {base}")
    out.print(table(f"{model} with one thing undone, at {at}", columns, rows))
    more = found["all_experts_flops"] - flops["to"]
    out.print(
        f"Without a mixture of experts {model} would need {more / 1e12:.2f} TFLOP more a token; its KV cache would not "
        "change. Shares are Shapley values: averages over all orders of making the changes.",
        soft_wrap=True,
    )


def show_plan(found: Mapping[str, Any]) -> None:
    """Does it fit, how long, how dear."""
    machine, memory = found["machine"], found["memory"]
    many = f"{machine['count']} x " if machine["count"] > 1 else ""
    head = f"{found['model']} at {found['context']:,} tokens on {many}{machine['name']} ({machine['source']})"
    out.print(head, style="bold", soft_wrap=True)
    each = " a device" if machine["count"] > 1 else ""
    rows = [
        ("routed experts" + each, bytes_text(memory["weights"]["routed_experts"])),
        ("other weights", bytes_text(memory["weights"]["other"])),
        ("embedding and tables", bytes_text(memory["weights"]["tables"])),
        ("KV cache, live", bytes_text(memory["kv_bytes"])),
        *((f"  {name}", bytes_text(count)) for name, count in memory["kv_by_component"].items()),
        ("activations, process", bytes_text(memory["own_bytes"])),
        ("needed" + each, bytes_text(memory["needed_bytes"])),
        ("usable" + each, bytes_text(memory["device_bytes"])),
    ]
    out.print(table("Memory", ("", "bytes"), rows))
    out.print(_verdict(found), soft_wrap=True)
    out.print(
        f"On disk: checkpoint {bytes_text(memory['checkpoint_bytes'])}, the context "
        f"{bytes_text(memory['kv_bytes'])} and {bytes_text(memory['restore_point_bytes'])} a restore point.",
        soft_wrap=True,
    )
    if found["time"]:
        _show_time(found)
        _show_money(found)
    elif memory["mode"] != "does not fit":
        out.print("How long it takes: run `tenfold doctor --measure` once (about 20 seconds), then ask again.")


def _verdict(found: Mapping[str, Any]) -> str:
    memory = found["memory"]
    longest = f"The longest context that fits is {memory['longest_context']:,} tokens."
    if memory["mode"] == "resident":
        return f"It fits, weights in memory. {longest}"
    if memory["mode"] == "experts from disk":
        return f"It fits with {100 * memory['streamed_share']:.0f} % of the routed experts read from disk. {longest}"
    more = memory["least_devices"]
    way_out = f"--gpus {more} of them hold it." if more else "No number of them does: each needs the other weights too."
    return f"It does not fit: {bytes_text(memory['needed_bytes'])} are needed on each device. {way_out}"


def _show_time(found: Mapping[str, Any]) -> None:
    time, batch = found["time"], found["batch"]
    out.print()
    out.print(
        f"First token after {duration_text(time['first_token_s'])}, then {time['tokens_per_s']:,.1f} tokens/s; "
        f"{time['binding']} binds. {bytes_text(found['bytes_read'])} are read for each token.",
        soft_wrap=True,
    )
    if batch:
        out.print(
            f"With {batch['sequences_each']:,} such sequences on each device ({batch['fit_each']:,} fit): "
            f"{batch['tokens_per_s_each']:,.0f} tokens/s a device, {batch['tokens_per_s_user']:,.0f} for each; "
            f"{batch['binding']} binds.",
            soft_wrap=True,
        )


def _show_money(found: Mapping[str, Any]) -> None:
    money, work = found["money"], found["workload"]
    load = "full load" if money["utilisation"] == 1 else f"{100 * money['utilisation']:.0f} % utilisation"
    if money["usd_per_hour"] is not None:
        out.print(
            f"At ${money['usd_per_hour']:.2f} an hour and device ({money['basis']}), {load}: "
            f"${money['usd_per_million_in']:.3f} / M tokens in, ${money['usd_per_million_out']:.3f} / M out.",
            soft_wrap=True,
        )
    if money["hosted"]:
        price = money["hosted"]
        label = f"{price['label']} since {price['since']}" if price["since"] else price["label"]
        figures = f"${price['hit']:g} hit, ${price['miss']:g} miss, ${price['output']:g} out / M"
        out.print(f"Hosted ({label}): {figures}.", soft_wrap=True)
    if work:
        out.print(
            f"Workload: {work['read']:,} tokens read in {duration_text(work['read_s'])}, {work['asks']} questions in "
            f"{duration_text(work['ask_s'])}: {_dollars(work['own_usd'])} here, {_dollars(work['hosted_usd'])} hosted.",
            soft_wrap=True,
        )


def _dollars(amount: float | None) -> str:
    return "n/a" if amount is None else f"${amount:,.2f}"
