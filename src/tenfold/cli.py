"""The command line: each verb parses, calls and shows. The work lives elsewhere.

Data goes to stdout, talk to stderr; `--json` prints one object. Exit codes: 0, 1 failed, 2 wrong usage or
input, 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar, cast

import typer

from tenfold.errors import InputError, TenfoldError, UsageError

if TYPE_CHECKING:
    from tenfold.budget import Need
    from tenfold.sampler import SamplingParams
    from tenfold.talk import Talk

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Read a million tokens with DeepSeek V4 on your own hardware.",
)

bench_app = typer.Typer(no_args_is_help=True, help="Measure a model on this machine.")
app.add_typer(bench_app, name="bench")
eval_app = typer.Typer(no_args_is_help=True, help="Measure what a model can do.")
app.add_typer(eval_app, name="eval")
store_app = typer.Typer(no_args_is_help=True, help="Look after the contexts kept on disk.")
app.add_typer(store_app, name="store")

P = ParamSpec("P")
N = TypeVar("N", int, float)

Model = Annotated[str, typer.Argument(help="Checkpoint folder, or an embedded model such as tiny-v4-flash.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Backend = Annotated[str, typer.Option(help="auto, reference, cpu or triton.")]
Numerics = Annotated[str, typer.Option(help="deployed: KV, index keys and activations rounded; exact: none.")]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with (default: the physical cores).")]
Memory = Annotated[str | None, typer.Option(help="Most memory to take, such as 12G (default: most of what is free).")]
StoreFolder = Annotated[Path | None, typer.Option("--store", help="The store (default: in your cache folder).")]
NoStore = Annotated[bool, typer.Option("--no-store", help="Keep nothing on disk.")]
StoreLimit = Annotated[str | None, typer.Option(help="Most bytes the store may take, such as 50G.")]
Context = Annotated[int | None, typer.Option(help="Tokens the session may hold (default: the model's context).")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option()]
TopK = Annotated[int, typer.Option(help="0 is off.")]
MinP = Annotated[float, typer.Option(help="0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages tokens of prompt and answer.")]
PresencePenalty = Annotated[float, typer.Option(help="-2 to 2, for tokens the answer has.")]
FrequencyPenalty = Annotated[float, typer.Option(help="-2 to 2, for each time the answer has a token.")]
LogitBias = Annotated[list[str] | None, typer.Option(help="ID=VALUE added to a token's logit; may be repeated.")]
Logprobs = Annotated[int | None, typer.Option(help="With --json: so many likeliest tokens beside each chosen one.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")]
ProfileName = Annotated[str | None, typer.Option("--profile", help="Chat grammar: preview, official, v3.2 or plain.")]
Thinking = Annotated[bool | None, typer.Option("--thinking/--no-thinking", help="Reason before the answer.")]
Effort = Annotated[str | None, typer.Option(help="Reasoning effort: low, high or max.")]

StoredId = Annotated[str, typer.Argument(metavar="ID", help="Id of a stored context; its beginning is enough.")]


def main() -> NoReturn:
    """The entry point of the `tenfold` command."""
    try:
        app()
    except KeyboardInterrupt:
        os._exit(130)  # while Python itself was still starting or ending
    sys.exit(0)


def reported(verb: Callable[P, None]) -> Callable[P, None]:
    """Turns what goes wrong in a verb into one sentence on stderr and its exit code."""

    @functools.wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            verb(*args, **kwargs)
        except TenfoldError as exc:
            typer.echo(f"error: {exc}", err=True)
            raise typer.Exit(exc.exit_code) from exc
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on; stay silent at exit
            raise typer.Exit(1) from None

    return wrapped


def _show_version(wanted: bool) -> None:
    if wanted:
        from tenfold import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")] = False,
) -> None:
    """Read a million tokens with DeepSeek V4 on your own hardware."""


@app.command()
@reported
def run(
    model: Model,
    question: Annotated[str | None, typer.Argument(help="What to ask; with --file or stdin, about that text.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text to read first; - is stdin.")] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    logprobs: Logprobs = None,
    seed: Seed = None,
    stop: Stop = None,
    profile: ProfileName = None,
    thinking: Thinking = None,
    effort: Effort = None,
    context: Context = None,
    backend: Backend = "auto",
    numerics: Numerics = "deployed",
    memory: Memory = None,
    threads: Threads = None,
    store: StoreFolder = None,
    no_store: NoStore = False,
    store_limit: StoreLimit = None,
    as_json: Json = False,
) -> None:
    """Read a text, answer a question about it."""
    prompt = _prompt(question, file)
    params = _sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_bias(logit_bias),
        logprobs=logprobs,
        seed=seed,
        stop=tuple(stop or ()),
    )
    talk = _open(model, backend, numerics, memory, threads, context, profile, (store, no_store, store_limit))
    ids = talk.render([{"role": "user", "content": prompt}], thinking=thinking, effort=effort)
    plan = talk.plan(len(ids), max_tokens)
    if not as_json:
        _print_plan(plan, talk.weights_told)
    clock = talk.read(ids)
    completion = talk.complete(params, thinking, show=not as_json)
    if as_json:
        _print_json(talk.report(completion, clock, len(ids)))
    else:
        _print_summary(talk.report(completion, clock, len(ids)))


@app.command()
@reported
def chat(
    model: Model,
    max_tokens: MaxTokens = 4096,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    profile: ProfileName = None,
    thinking: Thinking = None,
    effort: Effort = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    context: Context = None,
    backend: Backend = "auto",
    numerics: Numerics = "deployed",
    memory: Memory = None,
    threads: Threads = None,
    store: StoreFolder = None,
    no_store: NoStore = False,
    store_limit: StoreLimit = None,
    as_json: Json = False,
) -> None:
    """Talk with a model; each line is a message, an empty line or Ctrl-D ends."""
    params = _sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    talk = _open(model, backend, numerics, memory, threads, context, profile, (store, no_store, store_limit))
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    while (line := _ask(quiet=as_json)) is not None:
        messages.append({"role": "user", "content": line})
        ids = talk.render(messages, thinking=thinking, effort=effort)
        clock = talk.read(ids)
        completion = talk.complete(params, thinking, show=not as_json)
        messages.append(talk.message)
        if as_json:
            _print_json(talk.report(completion, clock, len(ids)))


@app.command()
@reported
def serve(
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder, or the embedded model tiny-v4-flash.")] = None,
    host: Annotated[str | None, typer.Option(help="Where to listen (default: 127.0.0.1, this machine only).")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one (default: 8000).")] = None,
    name: Annotated[list[str] | None, typer.Option(help="What the model is called; repeatable, first wins.")] = None,
    keys: Annotated[str | None, typer.Option(help="File of API keys, or their sha256:HASH, one a line.")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Let everybody in who can reach HOST.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another name of this server; repeatable.")] = None,
    shared_cache: Annotated[
        bool | None, typer.Option("--shared-cache", help="Let all keys find each other's prefixes.")
    ] = None,
    queue: Annotated[int | None, typer.Option(help="Most requests that may wait (default: 256).")] = None,
    drain: Annotated[float | None, typer.Option(help="Seconds for answers under way at SIGTERM (default: 30).")] = None,
    restart: Annotated[
        bool | None, typer.Option("--restart/--no-restart", help="Start an engine that died again (default), or end.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--config", help="A TOML file with any of these options.")] = None,
    profile: ProfileName = None,
    backend: Annotated[str | None, typer.Option(help="auto, reference, cpu or triton.")] = None,
    numerics: Annotated[str | None, typer.Option(help="deployed or exact.")] = None,
    memory: Memory = None,
    threads: Threads = None,
    store: Annotated[str | None, typer.Option(help="The store (default: in your cache folder).")] = None,
    no_store: Annotated[bool | None, typer.Option("--no-store", help="Keep nothing on disk.")] = None,
    store_limit: StoreLimit = None,
) -> None:
    """Serve a model to OpenAI's and Anthropic's clients, and a web page, over HTTP."""
    given = {option: value for option, value in locals().items() if option != "file"}
    from tenfold.server import serving

    serving.serve(serving.options_of(given, file))


@app.command()
@reported
def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, embedded model, or preset: v4-flash, v4-pro, v3.2.")],
    context: Annotated[list[int] | None, typer.Option(help="Show KV bytes at this length; may be repeated.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show architecture, parameters, tensors, formats, streams and KV bytes of a model."""
    from tenfold import config as configuration
    from tenfold import inspection

    wrong = [length for length in context or [] if not 1 <= length <= 1 << 40]
    if wrong:
        raise UsageError(f"--context is {wrong[0]}, expected a number of tokens from 1")
    config = configuration.load(model)
    found = inspection.describe(config, context or inspection.CONTEXTS)
    if model not in configuration.PRESETS or Path(model).is_dir():
        from tenfold.weights import open_weights

        opened = open_weights(configuration.locate(model), config)
        found["formats"] = inspection.formats_of(opened)
        if tensors:
            found["tensors"] = [
                {"name": t.name, "shape": list(t.shape), "format": t.format, "bytes": t.num_bytes, "shard": t.shard}
                for t in opened
            ]
    if as_json:
        _print_json(found)
    else:
        from tenfold import views

        views.show_inspection(model, found)


@app.command()
@reported
def compare(
    models: Annotated[list[str] | None, typer.Argument(help="Presets, folders or config.json files.")] = None,
    against: Annotated[str, typer.Option(help="The model the others are compared with.")] = "v3.2",
    context: Annotated[str, typer.Option(help="Tokens: 4096, 128K, 1M or 1Mi.")] = "1M",
    by: Annotated[str | None, typer.Option(help="component: FLOPs and KV bytes of each.")] = None,
    why: Annotated[bool, typer.Option("--why", help="Share the saving out among its causes.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE: another column; repeatable.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the charts to FILE.svg or FILE.png.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with charts and sliders.")] = None,
    as_json: Json = False,
) -> None:
    """Compare what models cost: parameters, FLOPs, KV cache; claimed beside computed. Needs no weights."""
    from tenfold import planner_cli

    planner_cli.compare(models or [], against, context, by, why, set_ or [], plot, html, as_json)


@app.command()
@reported
def plan(
    model: Annotated[str, typer.Argument(help="Preset (v4-flash, v4-pro, v3.2), folder or config.json.")],
    context: Annotated[str, typer.Option(help="Tokens: 4096, 128K, 1M or 1Mi.")] = "128K",
    machine: Annotated[str, typer.Option(help="this, H100, H200, B200, RTX-5090, M3-Ultra, ...")] = "this",
    gpus: Annotated[int, typer.Option(help="So many of them.")] = 1,
    set_: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE of config.json; repeatable.")] = None,
    workload: Annotated[str | None, typer.Option(help='"read 1M once, ask 50 x 1K, answer 300".')] = None,
    price: Annotated[str | None, typer.Option(help="A host's HIT/MISS/OUTPUT in $ per million tokens.")] = None,
    hourly: Annotated[float | None, typer.Option(help="$ per hour and device.")] = None,
    power_price: Annotated[float, typer.Option(help="$ per kWh, where no rent is known.")] = 0.30,
    utilisation: Annotated[float, typer.Option(help="Share of the hours that are used.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Say before any download whether a model fits, how long it takes and what it costs."""
    from tenfold import planner_cli

    asked = planner_cli.Asked(context, machine, gpus, set_ or [], workload, price, hourly, power_price, utilisation)
    planner_cli.plan(model, asked, as_json)


@app.command()
@reported
def doctor(
    measure: Annotated[bool, typer.Option("--measure", help="Measure speeds and keep them for `plan`.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show what works on this machine, what is missing, and the command that mends it."""
    import torch  # noqa: F401  the native library takes its threads from torch

    from tenfold import doctor as examination
    from tenfold import views

    found = examination.examine(threads)
    if measure:
        found["measured"] = examination.measure()
    if as_json:
        _print_json(found)
    else:
        views.show_doctor(found)
    if any(check["state"] == "broken" for check in found["checks"]):
        raise typer.Exit(1)


@app.command()
@reported
def synth(
    preset: Annotated[str, typer.Argument(help="v4-flash, v4-pro, v3.2, or a checkpoint folder to imitate.")],
    folder: Annotated[Path, typer.Argument(help="New or empty folder to write to.")],
    layers: Annotated[int | None, typer.Option(help="Fewer layers, in the preset's pattern.")] = None,
    hidden: Annotated[int | None, typer.Option(help="A smaller hidden size.")] = None,
    experts: Annotated[int | None, typer.Option(help="Fewer routed experts.")] = None,
    vocab: Annotated[int | None, typer.Option(help="A smaller vocabulary.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any integer field: NAME=VALUE; repeatable.")] = None,
    fmt: Annotated[str, typer.Option("--format", help="official, bf16 or f32.")] = "official",
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Json = False,
) -> None:
    """Write a random checkpoint in the official layout, at any size."""
    from tenfold import synth as making
    from tenfold import views

    config = making.shrink(
        preset, layers=layers, hidden=hidden, experts=experts, vocab=vocab, **_pairs("--set", set_, int)
    )
    with views.writing(quiet=as_json) as progress:
        written = making.synth(config, folder, seed=seed, fmt=cast("making.Fmt", fmt), progress=progress)
    found = {
        "folder": str(folder),
        "tensors": written.num_tensors,
        "shards": written.num_shards,
        "bytes": written.payload_bytes,
    }
    if as_json:
        _print_json(found)
    else:
        views.show_written(found)


@app.command()
@reported
def demo(
    context: Annotated[str, typer.Option(help="Tokens to read: 128K, 1M, 1Mi.")] = "128K",
    model: Annotated[str | None, typer.Option(help="Who reads: an embedded model (tiny-v4-flash) or a folder.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Let every embedded model read.")] = False,
    needles: Annotated[int, typer.Option(help="Facts to hide.")] = 10,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text and facts.")] = 1,
    text: Annotated[Path | None, typer.Option(help="A text of your own to hide them in.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures to FILE.svg or FILE.png.")] = None,
    memory: Memory = None,
    threads: Threads = None,
    store: StoreFolder = None,
    no_store: NoStore = False,
    as_json: Json = False,
) -> None:
    """Hide facts in a long text, let an embedded model read it and find them; memory and work beside V3.2's."""
    from tenfold import charts, talk
    from tenfold import demo as showing
    from tenfold.demo import table
    from tenfold.planner.prices import parse_tokens

    if plot is not None:
        charts.check_name(plot)
    models, beside = showing.chosen(model, every)
    words = None if text is None else _read_file(text)
    tokens, kept = parse_tokens(context), talk.open_store(store, no_store, None)
    task = showing.Task(tokens, needles, seed, words, kept, memory, threads)
    if not as_json:
        table.introduce(task, "the SQLite documentation" if text is None else str(text))
    found = showing.show(models, beside, task)
    if plot is not None:
        table.draw(found, plot)
    _print_json(found) if as_json else table.show(found)


@bench_app.command("context")
@reported
def bench_context(
    models: Annotated[list[str], typer.Argument(help="Checkpoint folders, or embedded models such as tiny-v4-flash.")],
    context: Annotated[str, typer.Option(help="The longest context: 64K, 256K, 1Mi.")] = "64K",
    sampled: Annotated[
        bool, typer.Option("--sampled", help="Do not read it all: random rows, then the last 512 tokens.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the figures to FILE.csv.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them to FILE.svg or FILE.png.")] = None,
    backend: Backend = "auto",
    memory: Memory = None,
    threads: Threads = None,
    no_store: NoStore = False,
    as_json: Json = False,
) -> None:
    """Walk from 1K tokens to CONTEXT: prefill and decode tokens/s, live KV, bytes on disk, memory against the plan."""
    from tenfold import bench_views
    from tenfold.planner.prices import parse_tokens

    found = {
        bench_views.name(model): bench_views.run(
            model,
            parse_tokens(context),
            backend,
            memory,
            threads,
            keep=not no_store,
            sampled=sampled,
            quiet=as_json,
        )
        for model in models
    }
    if csv is not None:
        bench_views.write_csv(found, csv)
    if plot is not None:
        bench_views.draw(found, plot)
    if as_json:
        _print_json({model: [one.report() for one in frontiers] for model, frontiers in found.items()})


@eval_app.command("needle")
@reported
def eval_needle(
    model: Annotated[str | None, typer.Argument(help="Folder, embedded model, or a model's name at the URL.")] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="An OpenAI-compatible server to ask.")] = None,
    api: Annotated[str, typer.Option(help="With --endpoint: chat or completions.")] = "chat",
    api_key: Annotated[str | None, typer.Option(envvar="TENFOLD_API_KEY", help="With --endpoint.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, such as 1K,128K,1M.")] = "1K,4K,16K,64K,256K,1M",
    depths: Annotated[int, typer.Option(help="Bands of depth.")] = 10,
    per_cell: Annotated[int, typer.Option(help="Facts in each band at each length.")] = 10,
    seed: Annotated[int, typer.Option(help="The same seed gives the same texts and facts.")] = 0,
    text: Annotated[Path | None, typer.Option(help="A text of your own to hide them in.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep all answers in FILE; a second start goes on.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a heat-map to FILE.svg or FILE.png.")] = None,
    backend: Backend = "auto",
    numerics: Numerics = "deployed",
    memory: Memory = None,
    threads: Threads = None,
    store: Annotated[Path | None, typer.Option(help="A store to keep what is read in (default: none).")] = None,
    as_json: Json = False,
) -> None:
    """Hide facts at all depths of texts of growing length, ask for each: a grid of how many are found."""
    from tenfold import needle_cli

    asked = needle_cli.Asked(model, endpoint, api, api_key, backend, numerics, memory, threads, store)
    words = None if text is None else _read_file(text)
    needle_cli.evaluate(asked, lengths, (depths, per_cell, seed), words, out, plot, as_json)


@store_app.command("list")
@reported
def store_list(folder: StoreFolder = None, as_json: Json = False) -> None:
    """Show the stored contexts, the one used last first."""
    from tenfold import store_views
    from tenfold.store import admin

    with admin.opened(folder, _warn) as store:
        path, total_bytes = str(store.folder.path), store.index.total_bytes()
        found = {"store": path, "bytes": total_bytes, "contexts": admin.contexts(store)}
    _print_json(found) if as_json else store_views.show_contexts(found)


@store_app.command("show")
@reported
def store_show(context_id: StoredId, folder: StoreFolder = None, as_json: Json = False) -> None:
    """Show one context with its segments and restore points."""
    from tenfold import store_views
    from tenfold.store import admin

    with admin.opened(folder, _warn) as store:
        found = admin.show(store, context_id)
    _print_json(found) if as_json else store_views.show_context(found)


@store_app.command("verify")
@reported
def store_verify(folder: StoreFolder = None, as_json: Json = False) -> None:
    """Read everything; drop and name what is damaged or missing (exit code 1)."""
    from tenfold import store_views
    from tenfold.store import admin

    with admin.opened(folder, _warn) as store:
        found = admin.verify(store)
    _print_json(found) if as_json else store_views.show_verified(found)
    if found["damaged"]:
        raise typer.Exit(1)


@store_app.command("prune")
@reported
def store_prune(
    limit: Annotated[str | None, typer.Option(help="Keep this much, such as 10G; what is missed least goes.")] = None,
    older: Annotated[str | None, typer.Option(help="Remove what was not used for so long: 12h, 30d, 8w.")] = None,
    model: Annotated[str | None, typer.Option(help="Remove the contexts of this model.")] = None,
    folder: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Remove contexts."""
    from tenfold import store_views
    from tenfold.engine import parse_bytes
    from tenfold.store import admin

    if limit is older is model is None:
        raise UsageError("nothing says what to remove; give --limit, --older or --model")
    limit_bytes = None if limit is None else parse_bytes(limit, "--limit")
    older_s = None if older is None else admin.parse_age(older)
    with admin.opened(folder, _warn) as store:
        found = admin.prune(store, limit_bytes, older_s, model)
    _print_json(found) if as_json else store_views.show_pruned(found)


@store_app.command("export")
@reported
def store_export(
    context_id: StoredId,
    file: Annotated[Path, typer.Argument(help="The tar file to write; it must not exist.")],
    folder: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Write one context to a file."""
    from tenfold import store_views
    from tenfold.store import admin

    with admin.opened(folder, _warn) as store:
        found = admin.export_context(store, context_id, file)
    _print_json(found) if as_json else store_views.show_moved(found)


@store_app.command("import")
@reported
def store_import(
    file: Annotated[Path, typer.Argument(help="A file written by export, from somebody you trust.")],
    folder: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Take in a file written by export; everything in it is checked first."""
    from tenfold import store_views
    from tenfold.store import admin

    with admin.opened(folder, _warn, make=True) as store:
        found = admin.import_contexts(store, file)
    _print_json(found) if as_json else store_views.show_moved(found)


def _warn(what: str) -> None:
    typer.echo(f"warning: {what}", err=True)


def _open(
    model: str,
    backend: str,
    numerics: str,
    memory: str | None,
    threads: int | None,
    context: int | None,
    profile: str | None,
    keeping: tuple[Path | None, bool, str | None],
) -> Talk:
    from tenfold import talk

    store = talk.open_store(*keeping)
    return talk.open_talk(model, backend, numerics, memory, threads, context, profile, store)


def _print_plan(plan: Need, weights: str | None) -> None:
    from tenfold import views

    views.show_plan(plan, weights)


def _sampling(**fields: Any) -> SamplingParams:
    from tenfold.sampler import SamplingParams

    return SamplingParams(**fields)


def _prompt(question: str | None, file: Path | None) -> str:
    """The text to read, then the question; text comes from --file, or from stdin where it is not a terminal."""
    from tenfold.completion import read_text

    text = None
    if file is not None:
        text = _read_file(file)
    elif not sys.stdin.isatty():
        content = sys.stdin.buffer.read()
        if content.strip() or question is None:
            text = read_text(content, "stdin")
    elif question is None:
        raise UsageError("nothing to read: give a question, --file PATH, or text on stdin")
    return "\n\n".join(part for part in (text, question) if part)


def _read_file(path: Path) -> str:
    from tenfold.completion import read_text

    if str(path) == "-":
        return read_text(sys.stdin.buffer.read(), "stdin")
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise InputError(f"{path} cannot be read: {exc.strerror or exc}; check the path") from None
    return read_text(content, str(path))


def _ask(*, quiet: bool) -> str | None:
    """The next line of the user, None at the end."""
    if not quiet and sys.stdin.isatty():
        typer.echo("> ", err=True, nl=False)
    line = sys.stdin.readline().strip()
    return line or None


def _bias(assignments: list[str] | None) -> dict[int, float]:
    pairs = _pairs("--logit-bias", assignments, float)
    wrong = next((name for name in pairs if not name.isdigit()), None)
    if wrong is not None:
        raise UsageError(f"--logit-bias names {wrong!r}, expected a token id")
    return {int(name): value for name, value in pairs.items()}


def _pairs(option: str, assignments: list[str] | None, kind: Callable[[str], N]) -> dict[str, N]:
    """NAME=VALUE pairs."""
    pairs = {}
    for assignment in assignments or []:
        name, _, value = assignment.partition("=")
        try:
            pairs[name] = kind(value)
            valid = name.isidentifier() or name.isdigit()
        except ValueError:
            valid = False
        if not valid:
            raise UsageError(f"{option} is {assignment!r}, expected NAME=NUMBER")
    return pairs


def _print_json(found: dict[str, Any]) -> None:
    typer.echo(json.dumps(found, ensure_ascii=False))


def _print_summary(report: dict[str, Any]) -> None:
    from tenfold import views

    views.show_summary(report)
