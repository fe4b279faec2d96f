"""Counters for Prometheus, under vLLM's names where it has them, so that its dashboards work.

Labels are the served model and a few fixed words: nothing that a client can choose. Knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tenfold.server.engine_client import Jobs

__all__ = ["Metrics", "Times"]

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_TOKENS = (1, 10, 100, 1000, 4096, 16384, 65536, 131072, 262144, 524288, 1048576)
_WEIGHT = 0.1  # of the newest job in the running mean


@dataclass(slots=True)
class Times:
    """When the stages of a job came, in monotonic seconds; None for a stage that did not."""

    began: float
    admitted: float | None = None
    first: float | None = None
    last: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reason: str = "error"

    @property
    def ttft_s(self) -> float | None:
        return None if self.first is None else self.first - self.began

    @property
    def tokens_per_s(self) -> float | None:
        if self.first is None or self.last is None or self.completion_tokens < 2 or self.last <= self.first:
            return None
        return (self.completion_tokens - 1) / (self.last - self.first)


@dataclass(slots=True)
class Metrics:
    """One registry of its own for one server."""

    model: str
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    _mean_job_s: float = 1.0
    _counters: dict[str, Counter] = field(default_factory=dict)
    _gauges: dict[str, Gauge] = field(default_factory=dict)
    _histograms: dict[str, Histogram] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, says in (
            ("vllm:prompt_tokens", "Tokens of prompts, cached ones included."),
            ("vllm:generation_tokens", "Tokens generated."),
            ("vllm:prefix_cache_queries", "Tokens of prompts that were looked for in the store."),
            ("vllm:prefix_cache_hits", "Tokens of prompts that came from the store."),
        ):
            self._counters[name] = Counter(name, says, ["model_name"], registry=self.registry)
        self._counters["success"] = Counter(
            "vllm:request_success",
            "Requests by how they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._counters["answers"] = Counter(
            "tenfold:http_requests", "Answers by route and status.", ["route", "status"], registry=self.registry
        )
        for name, says in (
            ("vllm:num_requests_running", "Requests the engine works on."),
            ("vllm:num_requests_waiting", "Requests in the queue."),
            ("tenfold:kv_bytes", "Bytes of KV held for running requests."),
            ("tenfold:store_bytes", "Bytes of the store on disk."),
            ("tenfold:engine_rss_bytes", "Memory of the engine's process."),
            ("tenfold:engine_steps", "Passes of the engine since it started."),
            ("tenfold:engine_up", "1 while the engine makes progress."),
        ):
            self._gauges[name] = Gauge(name, says, ["model_name"], registry=self.registry)
        for name, says, buckets in (
            ("vllm:time_to_first_token_seconds", "From request to first token.", _SECONDS),
            ("vllm:e2e_request_latency_seconds", "From request to last token.", _SECONDS),
            ("vllm:request_queue_time_seconds", "From request to admission.", _SECONDS),
            ("vllm:request_prefill_time_seconds", "From admission to first token.", _SECONDS),
            ("vllm:request_decode_time_seconds", "From first to last token.", _SECONDS),
            ("vllm:time_per_output_token_seconds", "Mean time per token after the first.", _PER_TOKEN_S),
            ("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS),
            ("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS),
        ):
            self._histograms[name] = Histogram(name, says, ["model_name"], buckets=buckets, registry=self.registry)

    def mean_job_s(self) -> float:
        """About how long jobs have taken lately."""
        return self._mean_job_s

    def answered(self, route: str, status: int) -> None:
        self._counters["answers"].labels(route, str(status)).inc()

    def finished(self, times: Times, now: float) -> None:
        """Counts a job that has ended."""
        for name, amount in (
            ("vllm:prompt_tokens", times.prompt_tokens),
            ("vllm:generation_tokens", times.completion_tokens),
            ("vllm:prefix_cache_queries", times.prompt_tokens if times.admitted is not None else 0),
            ("vllm:prefix_cache_hits", times.cached_tokens),
        ):
            self._counters[name].labels(self.model).inc(amount)
        self._counters["success"].labels(self.model, times.reason).inc()
        self._mean_job_s += _WEIGHT * (now - times.began - self._mean_job_s)
        self._observe("vllm:e2e_request_latency_seconds", now - times.began)
        self._observe("vllm:request_prompt_tokens", times.prompt_tokens)
        self._observe("vllm:request_generation_tokens", times.completion_tokens)
        if times.admitted is not None:
            self._observe("vllm:request_queue_time_seconds", times.admitted - times.began)
        if times.first is not None and times.last is not None:
            self._observe("vllm:time_to_first_token_seconds", times.first - times.began)
            self._observe("vllm:request_prefill_time_seconds", times.first - (times.admitted or times.began))
            self._observe("vllm:request_decode_time_seconds", times.last - times.first)
        if times.tokens_per_s:
            self._observe("vllm:time_per_output_token_seconds", 1 / times.tokens_per_s)

    def page(self, jobs: Jobs) -> bytes:
        """The text that Prometheus reads."""
        pulse = jobs.pulse
        self._gauges["tenfold:engine_up"].labels(self.model).set(jobs.alive())
        for name, value in (
            ("vllm:num_requests_running", 0 if pulse is None else pulse.running),
            ("vllm:num_requests_waiting", 0 if pulse is None else pulse.waiting),
            ("tenfold:kv_bytes", 0 if pulse is None else pulse.kv_bytes),
            ("tenfold:store_bytes", 0 if pulse is None else pulse.store_bytes),
            ("tenfold:engine_rss_bytes", 0 if pulse is None else pulse.rss_bytes),
            ("tenfold:engine_steps", 0 if pulse is None else pulse.steps),
        ):
            self._gauges[name].labels(self.model).set(value)
        return generate_latest(self.registry)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].labels(self.model).observe(value)
