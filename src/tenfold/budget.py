"""What a session will take of this machine's memory, known before any of it is taken.

The engine asks once for a context and gets the chunk and the tile it has to keep to; nothing it allocates grows with
context times chunk. Knows configs and bytes; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tenfold.config import DeepseekV4Config, DeepseekV32Config, ModelConfig
from tenfold.errors import DoesNotFit
from tenfold.formats import exact_layout

__all__ = ["SLACK_BYTES", "Budget", "Need", "fit", "gpu_session_bytes", "longest", "shared_tile_tokens", "stream_bytes"]

_MOST_CHUNK_TOKENS = 65536
_LEAST_TILE_TOKENS, _MOST_TILE_TOKENS = 32, 2048
_TILE_BYTES = 16 << 20
_EXPERT_ROWS = 24
_MANY_EXPERT_ROWS = 128
_UNHURRIED_CHUNK_TOKENS = 4096
_TOKENS_PER_S_FLOPS = 240e9
_PATIENCE_S = 0.9
_ID_BYTES = 3 * 4
"""A token id as the session keeps it, as the caller holds it, and of what is left to read."""
_MOST_KERNEL_SCRATCH_BYTES = 64 << 20
SLACK_BYTES = 16 << 20
"""What the allocator keeps of freed memory until a layer ends, as measured: 7 to 30 MB, most often some 16, and half of
that where no more than two tiles go through a layer."""
_GPU_TILE_TOKENS = 4096
_LEAST_GPU_TILE_TOKENS = 512
_GPU_SCRATCH_BYTES = 8 << 30
_RESTORE_POINTS = 8


@dataclass(frozen=True, slots=True)
class Budget:
    """What there is: `memory_bytes` for the whole process, of which `base_bytes` are gone before the first token.

    `weights_bytes` are pages of mapped files: the system keeps as many of them as it has room for and drops them when
    it has not, so they are told but not charged. `streamed` says that they do not all fit beside the rest.
    With `on_gpu` all of it is the GPU's, weights included, which are part of `base_bytes`.
    """

    memory_bytes: int
    base_bytes: int
    weights_bytes: int
    streamed: bool
    on_gpu: bool = False


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a session of `context` tokens, by what they are for, and how it reads: `chunk_tokens` go through one
    layer before the next, `tile_tokens` of them at a time, through its experts `wide_tokens`. A longer context would
    read `most_tile_tokens` at a time."""

    context: int
    chunk_tokens: int
    tile_tokens: int
    most_tile_tokens: int
    wide_tokens: int
    base_bytes: int
    weights_bytes: int
    kv_bytes: int
    ids_bytes: int
    points_bytes: int
    residual_bytes: int
    scratch_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything but the mapped weights."""
        session = self.kv_bytes + self.ids_bytes + self.points_bytes
        return self.base_bytes + session + self.residual_bytes + self.scratch_bytes

    def in_chunks(self, chunk_tokens: int) -> Need:
        """The same with chunks of at most `chunk_tokens`."""
        chunk = min(self.chunk_tokens, chunk_tokens)
        residual = self.residual_bytes * chunk // self.chunk_tokens
        tile, most_tile = min(self.tile_tokens, chunk), min(self.most_tile_tokens, chunk)
        wide = min(self.wide_tokens, chunk)
        return replace(
            self,
            chunk_tokens=chunk,
            tile_tokens=tile,
            most_tile_tokens=most_tile,
            wide_tokens=wide,
            residual_bytes=residual,
        )


def shared_tile_tokens(needs: Iterable[Need]) -> int:
    """The tile of a pass of several sessions: what each may have, put together, but no more than any could have."""
    every = tuple(needs)
    return min(sum(need.tile_tokens for need in every), *(need.most_tile_tokens for need in every))


def longest(config: ModelConfig, most: int, budget: Budget, exact: bool) -> Need:
    """For the longest context up to `most` tokens that fits, in steps of 128; DoesNotFit where not even 128 do."""
    try:
        return fit(config, most, budget, exact=exact)
    except DoesNotFit:
        if most <= 128:
            raise
    low, high = 1, most // 128
    while low < high:
        middle = (low + high + 1) // 2
        try:
            fit(config, 128 * middle, budget, exact=exact)
            low = middle
        except DoesNotFit:
            high = middle - 1
    return fit(config, 128 * low, budget, exact=exact)


def fit(config: ModelConfig, context: int, budget: Budget, *, exact: bool = False) -> Need:
    """The fastest way to read up to `context` tokens within the budget.

    Raises DoesNotFit with the longest context that fits and the memory this one needs.
    """
    tile = _GPU_TILE_TOKENS if budget.on_gpu else _tile_tokens(config)
    while tile > _LEAST_TILE_TOKENS and _need(config, context, tile, tile, tile, budget, exact).total_bytes > _room(
        budget
    ):
        tile //= 2
    least = _need(config, context, tile, tile, tile, budget, exact)
    if least.total_bytes > budget.memory_bytes:
        raise DoesNotFit(_refusal(config, least, budget, exact))
    free = _room(budget) - least.total_bytes + least.residual_bytes
    chunk = max(tile, min(_wanted_chunk(budget, tile), free // _residual_bytes(config, 1)) // tile * tile)
    need = _need(config, context, chunk, tile, tile, budget, exact)
    wide = _wide_tokens(config, need, _room(budget) - need.total_bytes, budget.on_gpu)
    return _need(config, context, chunk, tile, wide, budget, exact)


def gpu_session_bytes(config: ModelConfig, context: int, *, exact: bool = False) -> int:
    """What a session of `context` tokens takes of a GPU beside the weights, in the least chunks."""
    budget = Budget(0, 0, 0, streamed=False, on_gpu=True)
    least = _LEAST_GPU_TILE_TOKENS
    return _need(config, context, least, least, least, budget, exact).total_bytes


def stream_bytes(config: ModelConfig, context: int, *, exact: bool = False) -> int:
    """KV bytes of a session after `context` tokens."""
    rows = (
        (spec, exact_layout(spec.layout) if exact and spec.component != "state" else spec.layout)
        for spec in config.streams
    )
    return sum(spec.rows_at(context) * layout.row_bytes for spec, layout in rows)


def _need(config: ModelConfig, context: int, chunk: int, tile: int, wide: int, budget: Budget, exact: bool) -> Need:
    most_tile, tile, wide, chunk = tile, min(tile, context), min(wide, context), min(chunk, context)
    return Need(
        context=context,
        chunk_tokens=chunk,
        tile_tokens=tile,
        most_tile_tokens=most_tile,
        wide_tokens=wide,
        base_bytes=budget.base_bytes,
        weights_bytes=budget.weights_bytes,
        kv_bytes=stream_bytes(config, context, exact=exact),
        ids_bytes=context * _ID_BYTES,
        points_bytes=_RESTORE_POINTS * (stream_bytes(config, 0, exact=exact) + 4 * config.vocab_size),
        residual_bytes=_residual_bytes(config, chunk),
        scratch_bytes=_scratch_bytes(config, tile, wide, chunk, budget.on_gpu),
    )


def _room(budget: Budget) -> int:
    """What speed may cost: the last tenth stays free."""
    return budget.memory_bytes - budget.memory_bytes // 10


def _wanted_chunk(budget: Budget, tile: int) -> int:
    """Weights that are read from disk again and again want long chunks; those in memory gain nothing from them."""
    return _MOST_CHUNK_TOKENS if budget.streamed else max(tile, _UNHURRIED_CHUNK_TOKENS)


def _tile_tokens(config: ModelConfig) -> int:
    """Tokens whose numbers a layer can hold without taking ever new pages, or more that each expert gets some rows of.

    But no more than those for which the routed experts, the longest operation, take under a second on a few cores.
    """
    flops = 6 * config.num_experts_per_tok * config.hidden_size * config.moe_intermediate_size
    patient = int(_PATIENCE_S * _TOKENS_PER_S_FLOPS / flops)
    for_experts = _EXPERT_ROWS * config.n_routed_experts // config.num_experts_per_tok
    tokens = min(patient, max(_TILE_BYTES // (4 * sum(_token_numbers(config))), for_experts))
    return min(max(_LEAST_TILE_TOKENS, 1 << tokens.bit_length() - 1), _MOST_TILE_TOKENS)


def _residual_bytes(config: ModelConfig, tokens: int) -> int:
    """The residual streams, float32: all that is kept of a chunk from one layer to the next."""
    streams = config.hc_mult if isinstance(config, DeepseekV4Config) else 1
    return 4 * streams * config.hidden_size * tokens


def _wide_tokens(config: ModelConfig, need: Need, free_bytes: int, on_gpu: bool) -> int:
    """Tokens that go through the experts at a time: each is read once for all of its tokens, and multiplies many rows
    faster than few. As many as fit in what a tile takes anyway and in what is free, and as one expert is done with
    under a second, if all choose it; more than some rows each bring nothing."""
    if on_gpu:
        return need.tile_tokens
    tile, chunk = need.tile_tokens, need.chunk_tokens
    useful = min(chunk, _MANY_EXPERT_ROWS * config.n_routed_experts // config.num_experts_per_tok)
    room = _tile_bytes(config, tile) + max(0, free_bytes)
    patient = int(_PATIENCE_S * _TOKENS_PER_S_FLOPS / (6 * config.hidden_size * config.moe_intermediate_size))
    wide = tile
    while wide < useful and wide + tile <= patient and _wide_bytes(config, wide + tile) <= room:
        wide += tile
    parts = -(-chunk // wide)
    return min(wide, -(-chunk // parts // tile) * tile)


def _scratch_bytes(config: ModelConfig, tile: int, wide: int, chunk: int, on_gpu: bool) -> int:
    """What a tile needs on its way through a layer, float32, and what kernels and the allocator take for themselves.

    Experts begin when attention has given its memory back; a GPU's allocator keeps it.
    """
    residual, attention = (4 * numbers * tile for numbers in _token_numbers(config))
    if on_gpu:
        return residual + attention + min(_routed_bytes(config, tile), _GPU_SCRATCH_BYTES) + SLACK_BYTES
    slack = SLACK_BYTES if chunk > 2 * tile else SLACK_BYTES // 2
    most = max(_tile_bytes(config, tile), _wide_bytes(config, wide) if wide > tile else 0)
    return residual + most + slack


def _tile_bytes(config: ModelConfig, tile: int) -> int:
    """Of attention, then of the experts of a tile."""
    return max(4 * _token_numbers(config)[1] * tile, min(_routed_bytes(config, tile), _MOST_KERNEL_SCRATCH_BYTES))


def _wide_bytes(config: ModelConfig, tokens: int) -> int:
    """Of experts that take more than a tile: what they are given and give, what routes it, and the kernels' own."""
    streams = config.hc_mult if isinstance(config, DeepseekV4Config) else 0
    routing = 2 * config.n_routed_experts + 4 * config.num_experts_per_tok + streams * (streams + 1)
    kernels = min(_routed_bytes(config, tokens), _MOST_KERNEL_SCRATCH_BYTES)
    return 4 * (2 * config.hidden_size + routing) * tokens + kernels


def _routed_bytes(config: ModelConfig, tokens: int) -> int:
    """Of the kernels of so many tokens' routed experts, if they had no limit."""
    return 4 * tokens * config.num_experts_per_tok * (config.hidden_size + 3 * config.moe_intermediate_size)


def _token_numbers(config: ModelConfig) -> tuple[int, int]:
    """Numbers a token has in a layer at once beside what kernels take for themselves: residuals, and attention's."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    if isinstance(config, DeepseekV4Config):
        residual, row = (2 * config.hc_mult + 4) * hidden, config.head_dim
    else:
        assert isinstance(config, DeepseekV32Config)
        residual, row = 6 * hidden, config.kv_lora_rank + config.qk_rope_head_dim
    return residual, 2 * heads * row + 2 * config.index_n_heads * config.index_head_dim + config.index_topk


def _refusal(config: ModelConfig, least: Need, budget: Budget, exact: bool) -> str:
    fixed = least.total_bytes - least.kv_bytes - least.ids_bytes + stream_bytes(config, 0, exact=exact)
    left = budget.memory_bytes - fixed
    rows = stream_bytes(config, 1 << 20, exact=exact) - stream_bytes(config, 0, exact=exact)
    a_token = rows / (1 << 20) + _ID_BYTES
    longest = max(0, int(left / a_token) // 128 * 128)
    way = f"--context {longest} fits, or " if longest else ""
    return (
        f"{least.context:,} tokens need {_size(least.total_bytes)} of memory and {_size(budget.memory_bytes)} are "
        f"allowed; {way}--memory {least.total_bytes / (1 << 30) + 0.05:.1f}G would do"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
