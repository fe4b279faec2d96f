"""One completion under a demand: the tokens that may come next, worked out while the model computes.

`Grammars` turns demands into matchers, off the caller's thread; a `Matcher` is told each sampled token and gives the
next mask. Reasoning before the demand is free, but must end. Knows nothing of HTTP, engines and sampling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol

import llguidance
import numpy as np
import torch
from torch import Tensor

from tenfold.constrain.nursery import Nursery, Order, limits
from tenfold.constrain.vocabulary import Mask, Vocabulary, Watch, llguidance_tokenizer
from tenfold.errors import InputError, RunError
from tenfold.tokenizer import Tokenizer

__all__ = ["Demand", "Grammars", "Matcher"]

_MOST_KEPT = 32
_MOST_KEPT_CHARS = 8 << 20
_MOST_WAITING = 64
_MOST_MASK_S = 10.0  # llguidance bounds its work to some 50 ms a mask; this is for a machine that stands still
_END_OF_THINKING = "</think>"
_DSML = "｜DSML｜"


class Demand(Protocol):
    """What an output must be, as in wire.Constraint."""

    @property
    def kind(self) -> Literal["json", "regex", "tool_call", "tool_call_required"]: ...

    @property
    def schema(self) -> str: ...

    @property
    def after_thinking(self) -> bool: ...

    @property
    def in_call(self) -> bool: ...


class _Tables:
    """What all matchers share; takes seconds to make for a large vocabulary."""

    def __init__(self, tokenizer: Tokenizer, num_rows: int, eos_ids: tuple[int, ...]) -> None:
        self.vocabulary = Vocabulary.of(tokenizer, num_rows, eos_ids)
        self.tokenizer = llguidance_tokenizer(self.vocabulary, tokenizer.encode)
        self.end_of_thinking = Watch(self.vocabulary, _END_OF_THINKING.encode())
        self.dsml = Watch(self.vocabulary, _DSML.encode())
        self.dsml_id = self.vocabulary.control_id(_DSML)
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="masks")


class Grammars:
    """Demands -> matchers for one engine. Compiled grammars are kept in memory, a few, each for its `tenant` alone.

    `num_rows`: the width of the logits. `block`: the tag of a block of calls. Nothing is loaded and started before the
    first demand; `close` ends what was.
    """

    def __init__(
        self,
        load: Callable[[], Tokenizer],
        num_rows: int,
        eos_ids: tuple[int, ...],
        *,
        block: str = "tool_calls",
        seconds: float = 2.0,
    ) -> None:
        self._load, self._num_rows, self._eos_ids = load, num_rows, eos_ids
        self._block, self._seconds = block, seconds
        self._tables: _Tables | None = None
        self.nursery: Nursery | None = None
        self._kept: OrderedDict[tuple[str, Order], tuple[str, Any]] = OrderedDict()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._waiting = 0

    def start(self, demand: Demand, tenant: str = "") -> Future[Matcher]:
        """The matcher of a completion, when it is ready; InputError if the demand cannot be met, RunError if too many
        wait. Call it from one thread."""
        future: Future[Matcher]
        if self._waiting >= _MOST_WAITING:
            future = Future()
            future.set_exception(RunError(f"{self._waiting} schemas wait to be compiled; send the request again later"))
            return future
        self._waiting += 1
        future = self._compiler.submit(self._matcher, demand, tenant)
        future.add_done_callback(self._done)
        return future

    def close(self) -> None:
        """Ends threads and processes; what is being compiled fails."""
        self._compiler.shutdown(wait=False, cancel_futures=True)
        if self.nursery is not None:
            self.nursery.close()
        self._compiler.shutdown()
        if self._tables is not None:
            self._tables.pool.shutdown()

    def _done(self, future: Future[Matcher]) -> None:
        self._waiting -= 1

    def _matcher(self, demand: Demand, tenant: str) -> Matcher:
        if self._tables is None:
            self._tables = _Tables(self._load(), self._num_rows, self._eos_ids)
            self.nursery = Nursery(self._tables.vocabulary, self._seconds)
        order = Order(demand.kind, demand.schema, demand.in_call, self._block)
        return Matcher(self._compiled(order, tenant).deep_copy(), self._tables, demand)

    def _compiled(self, order: Order, tenant: str) -> Any:
        """llguidance's matcher at the start of an order's grammar, to be copied."""
        assert self._tables is not None
        assert self.nursery is not None
        if (tenant, order) not in self._kept:
            text = self.nursery.compile(order)
            made = llguidance.LLMatcher(self._tables.tokenizer, text, limits=limits(), log_level=0)
            if made.is_error():
                raise InputError("the schema cannot be enforced; simplify it")
            self._kept[tenant, order] = (text, made)
            while len(self._kept) > _MOST_KEPT or self._num_kept_chars() > _MOST_KEPT_CHARS:
                self._kept.popitem(last=False)
            return made
        self._kept.move_to_end((tenant, order))
        return self._kept[tenant, order][1]

    def _num_kept_chars(self) -> int:
        return sum(len(text) for text, _ in self._kept.values())


class Matcher:
    """The tokens that may come next. Tell it every sampled token; ask for the mask before the next is sampled.

    A demand that has come to a point where nothing may follow raises RunError, here and for this completion alone.
    """

    def __init__(self, inner: Any, tables: _Tables, demand: Demand) -> None:
        self._inner, self._tables = inner, tables
        self._calls = demand.kind.startswith("tool_call")
        self._thinks = demand.after_thinking
        self._thought = 0  # states of the two automata
        self._spelled = 0
        self._mask: Future[Tensor] = tables.pool.submit(self._next, None)

    def allowed(self) -> Tensor:
        """bool [vocab]: the tokens that may come next; an end-of-sequence token where the output may end."""
        return self._mask.result(_MOST_MASK_S)

    def advance(self, token: int) -> None:
        """The next token is this one; the mask behind it is worked out meanwhile."""
        before = self._mask
        self._mask = self._tables.pool.submit(self._next, token, before)

    def _next(self, token: int | None, before: Future[Tensor] | None = None) -> Tensor:
        if before is not None:
            before.result(_MOST_MASK_S)  # done, but where two tokens came at once
        if token is not None:
            self._take(token)
        mask = self._while_thinking() if self._thinks else self._by_grammar()
        return torch.from_numpy(mask)

    def _take(self, token: int) -> None:
        tables = self._tables
        if token == tables.dsml_id:
            self._spelled = 0
        elif self._calls:
            self._spelled, _ = tables.dsml.after(self._spelled, token)
        if self._thinks:
            self._thought, _ = tables.end_of_thinking.after(self._thought, token)
            self._thinks = self._thought < len(_END_OF_THINKING)
        elif not self._inner.consume_token(token):
            raise RunError("the output has left its schema; please report this")

    def _while_thinking(self) -> Mask:
        """Anything but to end, to begin a call, or to leave reasoning in the middle of a token."""
        tables = self._tables
        mask = np.ones(len(tables.vocabulary.spellings), np.bool_)
        mask[list(tables.vocabulary.eos_ids)] = False
        mask[tables.end_of_thinking.ending(self._thought).beyond] = False
        if self._calls:
            self._forbid_spelled_tags(mask)
            mask[tables.dsml_id] = False
        return mask

    def _by_grammar(self) -> Mask:
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=len(self._tables.vocabulary.spellings), bitorder="little").view(np.bool_)
        if self._calls:
            self._forbid_spelled_tags(mask)
        if not mask.any():
            reason = self._inner.stop_reason()
            raise RunError(f"nothing may follow what has been written so far ({reason}); simplify the schema")
        return mask

    def _forbid_spelled_tags(self, mask: Mask) -> None:
        """A tag that text spells is a tag to whoever parses the text: only the control token may write one."""
        ending = self._tables.dsml.ending(self._spelled).completing
        mask[ending[ending != self._tables.dsml_id]] = False
