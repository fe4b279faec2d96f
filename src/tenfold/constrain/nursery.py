"""The process where strangers' grammars are compiled first: each in a fork that has so much processor time and memory.

`python -m tenfold.constrain.nursery` reads the vocabulary and then orders from stdin, and answers each on stdout, in
frames of a length and JSON; `Nursery` is its owner's side. What compiles here within the limits is compiled again by
whoever needs it. Knows nothing of models; imports neither torch nor tokenizers, so that a fork is small.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

import llguidance
import numpy as np

from tenfold.constrain import grammar
from tenfold.constrain.vocabulary import Vocabulary, llguidance_tokenizer
from tenfold.errors import InputError, RunError, TenfoldError

__all__ = ["Nursery", "Order", "limits"]

_LENGTH = struct.Struct("<I")
_MOST_BYTES = 64 << 20
_MOST_MEMORY_BYTES = 512 << 20  # beyond what the vocabulary takes
_STEPS_TRIED = 8
_START_S = 60.0  # a loaded machine may take long to start a process
_PATIENCE = 5.0  # and gives a fork its seconds of processor time only within several times as many


@dataclass(frozen=True, slots=True)
class Order:
    """A demand: `kind`, `schema`, `in_call` as in wire.Constraint; `block` is the tag of a block of calls."""

    kind: Literal["json", "regex", "tool_call", "tool_call_required"]
    schema: str
    in_call: bool
    block: str


def limits() -> Any:
    """How much work llguidance may do; errors do not quote the grammar."""
    return llguidance.LLParserLimits(verbose_errors=False)


class Nursery:
    """Compiles one order after another in a process of its own; starts it when it is needed, again when it died."""

    def __init__(self, vocabulary: Vocabulary, seconds: float = 2.0) -> None:
        self._vocabulary, self._seconds = vocabulary, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def compile(self, order: Order) -> str:
        """The grammar of an order that compiles and can be followed within the limits, else InputError."""
        with self._lock:
            answer = self._asked(order) or self._asked(order)  # it may have died since the last order
        if answer is None:
            raise RunError("the process that checks grammars died; send the request again")
        if "grammar" in answer:
            return str(answer["grammar"])
        raise InputError(answer["error"])

    def _asked(self, order: Order) -> dict[str, Any] | None:
        try:
            process = self._running()
            _send(process.stdin, asdict(order))
            answer: dict[str, Any] = _receive(process.stdout, _PATIENCE * self._seconds + 5.0)
        except (OSError, EOFError, ValueError):
            self._end()
            return None
        return answer

    def close(self) -> None:
        """Ends the process, and an order it is at; after that nothing is compiled."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise EOFError
        if self._process is None or self._process.poll() is not None:
            self._end()
            command = [sys.executable, "-P", "-m", "tenfold.constrain.nursery"]
            alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # what has threads forks badly
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=alone)
            spoken = self._vocabulary
            facts = {"control_ids": sorted(spoken.control_ids), "eos_ids": spoken.eos_ids, "seconds": self._seconds}
            _send(self._process.stdin, {**facts, "spellings": [one.hex() for one in spoken.spellings]})
            _receive(self._process.stdout, _START_S)
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe and pipe.close()


# ------------------------------------------------------------------------------------------ the process


def main() -> None:
    """Answers orders until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides when it ends
    told = _receive(sys.stdin.buffer, None)
    spellings = tuple(map(bytes.fromhex, told["spellings"]))
    vocabulary = Vocabulary(spellings, frozenset(told["control_ids"]), tuple(told["eos_ids"]))
    tokenizer = llguidance_tokenizer(vocabulary, vocabulary.bytewise())
    dsml_id = vocabulary.control_id("｜DSML｜")
    gc.freeze()  # what a fork does not touch it shares
    _send(sys.stdout.buffer, {"ready": True})
    with contextlib.suppress(EOFError):
        while True:
            order = Order(**_receive(sys.stdin.buffer, None))
            _send(sys.stdout.buffer, _answer(order, tokenizer, dsml_id, told["seconds"]))


def _answer(order: Order, tokenizer: Any, dsml_id: int | None, seconds: float) -> dict[str, str]:
    """What a fork makes of the order, if it is neither killed nor dies."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _as_fork(order, tokenizer, dsml_id, theirs, seconds)
    os.close(theirs)
    answer: dict[str, str] | None = None
    late = False
    with os.fdopen(ours, "rb") as pipe:
        try:
            answer = _receive(pipe, _PATIENCE * seconds)
        except TimeoutError:
            late = True
        except EOFError:
            pass
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if answer is not None:
        return answer
    if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF):
        return {"error": f"the schema takes longer than {seconds:g} s to compile; simplify it"}
    megabytes = _MOST_MEMORY_BYTES >> 20
    return {"error": f"the schema takes more than {megabytes} MiB to compile, or is nested too deep; simplify it"}


def _as_fork(order: Order, tokenizer: Any, dsml_id: int | None, pipe: int, seconds: float) -> None:
    """Answers one order and ends the process, whatever happens."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust reports its panics there, and quotes
        _bound_itself(seconds)
        try:
            answer = {"grammar": _written(order, tokenizer, dsml_id)}
        except TenfoldError as exc:
            answer = {"error": str(exc)}
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as exc:
            answer = {"error": f"the schema is no JSON schema ({type(exc).__name__}); correct it"}
        with os.fdopen(pipe, "wb") as file:
            _send(file, answer)
    finally:
        os._exit(0)


def _bound_itself(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # processor time; what comes then ends the process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # not every system tells or limits
        with open("/proc/self/statm", encoding="ascii") as file:
            now_bytes = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now_bytes + _MOST_MEMORY_BYTES,) * 2)


def _written(order: Order, tokenizer: Any, dsml_id: int | None) -> str:
    if order.kind == "json":
        return _tried(grammar.json_grammar(order.schema), tokenizer)
    if order.kind == "regex":
        return _tried(grammar.regex_grammar(order.schema), tokenizer)
    if dsml_id is None:
        raise InputError("this model's vocabulary has no token ｜DSML｜, so it cannot call tools; leave tools out")
    required = order.kind == "tool_call_required"
    tools = grammar.tools_of(order.schema)

    def write(tools: list[grammar.Tool]) -> str:
        return grammar.tool_grammar(tools, dsml_id, required=required, in_call=order.in_call, block=order.block)

    try:
        return _tried(write(tools), tokenizer)
    except InputError:
        return _tried(write([_without_faults(tool) for tool in tools]), tokenizer)


def _without_faults(tool: grammar.Tool) -> grammar.Tool:
    """The tool with those parameters loosened whose schemas cannot be enforced; a strict tool is refused for one."""
    faults = {}
    for name, text in grammar.parameter_grammars(tool):
        if error := llguidance.LLMatcher.validate_grammar(text, limits=limits()):
            faults[name] = _reason(error)
    if faults and tool.strict:
        name, reason = next(iter(faults.items()))
        raise InputError(f"parameter {name} of tool {tool.name} cannot be enforced: {reason}; or leave strict out")
    return grammar.loosened(tool, set(faults))


def _tried(text: str, tokenizer: Any) -> str:
    """The grammar, if it compiles and a few steps along it can be made."""
    matcher = llguidance.LLMatcher(tokenizer, text, limits=limits(), log_level=0)
    chance = random.Random(0)
    for _ in range(_STEPS_TRIED):
        if matcher.is_error():
            raise InputError(f"the schema cannot be enforced: {_reason(matcher.get_error())}")
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        if matcher.is_stopped() or not len(allowed):
            break
        matcher.consume_token(int(chance.choice(allowed)))
    return text


def _reason(error: str) -> str:
    """llguidance's first sentence, without where in the grammar."""
    first = error.split("failed to compile JSON schema: ")[-1].strip().split("\n   ")[0]
    return " ".join(first.split())[:300]


# ------------------------------------------------------------------------------------------ frames


def _send(file: IO[bytes] | None, message: dict[str, Any]) -> None:
    assert file is not None
    body = json.dumps(message, ensure_ascii=True).encode()
    file.write(_LENGTH.pack(len(body)) + body)
    file.flush()


def _receive(file: IO[bytes] | None, seconds: float | None) -> Any:
    """The next message. EOFError if there is none any more, TimeoutError if it does not come in time."""
    assert file is not None
    end = None if seconds is None else time.monotonic() + seconds
    (length,) = _LENGTH.unpack(_exactly(file, _LENGTH.size, end))
    if length > _MOST_BYTES:
        raise ValueError("a frame is larger than frames are")
    return json.loads(_exactly(file, length, end))


def _exactly(file: IO[bytes], count: int, end: float | None) -> bytes:
    got = bytearray()
    while len(got) < count:
        if end is not None and not select.select([file], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError
        piece = os.read(file.fileno(), count - len(got))
        if not piece:
            raise EOFError
        got += piece
    return bytes(got)


if __name__ == "__main__":
    main()
