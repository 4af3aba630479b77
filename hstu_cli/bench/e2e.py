"""`bench-e2e`: whole requests of users whose histories grow, embedding to logits, with and without the cache."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from hstu_cli.bench.published import published_e2e_ms
from hstu_cli.bench.session import (
    BenchSession,
    OutOfMemoryError,
    Progress,
    out_of_memory_named,
    relative_error,
    wider,
)
from hstu_cli.config import ModelConfig
from hstu_cli.errors import UsageError
from hstu_cli.kernels.dispatch import exact_impl
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.model.buckets import Bucket
from hstu_cli.model.captured import CaptureFailedError
from hstu_cli.model.cost import SequenceShape, activation_bytes, block_bytes, block_flops, block_parameters
from hstu_cli.model.embedding import Lookup
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.graphs import why_not_captured
from hstu_cli.model.lookups import make_lookup
from hstu_cli.model.ranking import RankingModel, random_model
from hstu_cli.model.shaped_graphs import graph_runner
from hstu_cli.model.tokens import UserRequest
from hstu_cli.timing import Case, latency_summary

BASELINE, KVCACHE, GRAPH = VARIANTS = ("baseline", "kvcache", "kvcache+graph")

NUM_ITEMS = 10_000

NO_MEMORY = "ran out of memory"

AROUND_LAYERS = 2
"""Embedding and head round about as much as so many layers of the block."""


@dataclass(frozen=True, slots=True)
class GrowingUsers:
    """The workload: in batch i every user comes with (i + 1) * history_step tokens of history."""

    num_users: int
    history_step: int
    num_batches: int
    num_candidates: int

    def check(self, config: ModelConfig) -> None:
        """UsageError where the model's window or the tokens of an event do not allow it."""
        if self.history_step % 2:
            raise UsageError(f"--history-step {self.history_step}: an event is two tokens, so the step must be even.")
        events = self.history_step // 2 * self.num_batches
        if events > config.max_history:
            raise UsageError(
                f"--history-step {self.history_step} x --num-batches {self.num_batches} grows to {events:,} events, "
                f"beyond the model's window of {config.max_history:,} (max_history)."
            )

    def requests(self, config: ModelConfig, seed: int) -> list[list[UserRequest]]:
        """The requests of each batch."""
        rng = np.random.default_rng(seed)
        events = self.history_step // 2
        shape = (self.num_users, events * self.num_batches)
        videos, actions = rng.integers(0, NUM_ITEMS, shape), rng.integers(0, 256, shape)
        candidates = rng.integers(0, NUM_ITEMS, (self.num_batches, self.num_users, self.num_candidates))
        context = np.zeros(config.num_context_tokens, np.int64)
        return [
            [
                UserRequest(u, context, videos[u, :n], actions[u, :n], candidates[batch, u])
                for u in range(self.num_users)
            ]
            for batch, n in enumerate(range(events, shape[1] + 1, events))
        ]

    def shapes(self, config: ModelConfig, *, cached: bool) -> list[list[SequenceShape]]:
        """The sequences of each batch, where the history of the one before is cached or nothing is."""
        lengths = [config.num_context_tokens + self.history_step * (i + 1) for i in range(self.num_batches)]
        known = [0, *lengths[:-1]] if cached else [0] * self.num_batches
        return [
            [SequenceShape(n, m, self.num_candidates)] * self.num_users for n, m in zip(lengths, known, strict=True)
        ]

    def buckets(self, config: ModelConfig) -> list[Bucket]:
        """The sizes of the cached steps: graphs of them need no padding."""
        sizes = {sum(shape.num_new for shape in batch) for batch in self.shapes(config, cached=True)}
        return [Bucket(size, self.num_users) for size in sizes]

    def costs(self, config: ModelConfig, itemsize: int, *, cached: bool) -> list[tuple[int, int]]:
        """FLOPs and bytes of the block for each batch."""
        return [
            (block_flops(config, shapes), block_bytes(config, shapes, itemsize, stored=cached))
            for shapes in self.shapes(config, cached=cached)
        ]

    def cost(self, config: ModelConfig, itemsize: int, *, cached: bool) -> tuple[int, int]:
        """FLOPs and bytes of the block over all batches."""
        flops, num_bytes = zip(*self.costs(config, itemsize, cached=cached), strict=True)
        return sum(flops), sum(num_bytes)

    def pages(self, config: ModelConfig, page_size: int) -> int:
        """Pages that hold all users' histories."""
        tokens = config.num_context_tokens + self.history_step * self.num_batches
        return self.num_users * -(-tokens // page_size)

    def memory_bytes(
        self, config: ModelConfig, itemsize: int, page_size: int, *, dense: bool, num_caches: int = 1
    ) -> int:
        """About what the run needs at a time: weights twice (one copy is exact), pages, intermediates."""
        pages = num_caches * self.pages(config, page_size) * page_size * config.kv_elements_per_token
        tables = (NUM_ITEMS + config.position_buckets) * config.hidden_dim
        largest = self.shapes(config, cached=False)[-1]
        return (
            (itemsize + max(4, 2 * itemsize)) * (block_parameters(config) + tables)
            + itemsize * pages
            + 2 * activation_bytes(config, largest, itemsize, dense=dense)
        )


Key = tuple[str, str]
"""What names a run of a workload: embedding and variant."""


@dataclass
class _Variant:
    """One way to run the workload; `logits` holds what each batch gave the last time."""

    key: Key
    name: str
    engine: InferenceEngine
    logits: dict[int, np.ndarray] = field(default_factory=dict)

    def step(self, index: int, requests: Sequence[UserRequest]) -> None:
        self.logits[index] = self.engine.step(requests).logits

    def forget(self) -> None:
        """Begin anew: nobody is cached."""
        if self.engine.cache is not None:
            self.engine.cache.clear()

    def rehearse(self, batches: Sequence[Sequence[UserRequest]]) -> None:
        """Run the workload once, so that graphs which are captured for what steps need are there before it is timed."""
        graphs = self.engine.graphs
        if graphs is None or not graphs.learns_sizes:
            return
        self.forget()
        for requests in batches:
            self.engine.step(requests)
        graphs.capture_pending()
        graphs.forget_counts()


def benchmark_model(config: ModelConfig, seed: int) -> RankingModel:
    """Random weights, 10,000 items, one row for each contextual feature; float32 on the CPU."""
    return random_model(config, {}, {**dict.fromkeys(config.contextual_features, 1), "video_id": NUM_ITEMS}, seed=seed)


def run_e2e_benchmark(
    session: BenchSession,
    config: ModelConfig,
    workloads: Sequence[GrowingUsers],
    variants: Sequence[str],
    *,
    impl: str,
    append_impl: str,
    page_size: int,
    seed: int,
    embeddings: Sequence[str],
    preset: str | None,
    on_group: Progress = lambda done, total: None,
) -> Iterator[dict[str, Any]]:
    """Time each workload's variants with every embedding, in turns, and yield their rows.

    preset: whose published figures to add.
    """
    model = benchmark_model(config, seed)
    exact = InferenceEngine(copy.deepcopy(model).to(wider(session.dtype)), exact_impl(impl))
    model = model.to(session.backend.device, session.dtype)
    lookups = {embedding: make_lookup(embedding, model) for embedding in embeddings}
    for done, workload in enumerate(workloads):
        on_group(done, len(workloads))
        lacking = session.memory_lacking(
            workload.memory_bytes(
                config, session.dtype.itemsize, page_size, dense=impl == "reference", num_caches=len(embeddings)
            )
        )
        reasons = {name: lacking or _why_not(session, name, impl) for name in variants}
        runnable = [name for name in variants if reasons[name] is None]
        batches = workload.requests(config, seed)
        keys = itertools.product(lookups if runnable else (), dict.fromkeys((BASELINE, *runnable)))
        make = partial(
            _prepared,
            session,
            workload,
            model,
            lookups,
            KVCacheConfig(workload.pages(config, page_size), page_size, append_impl=append_impl),
            impl,
            batches,
        )
        results = _results(session, workload, make, list(keys), config, exact, batches)
        for embedding, name in itertools.product(lookups, variants):
            row = {
                "batch_size": workload.num_users,
                "num_users": workload.num_users,
                "variant": name,
                "embedding": embedding,
                "impl": impl,
            }
            published = published_e2e_ms(
                preset,
                workload.num_users,
                name,
                workload.history_step,
                workload.num_batches,
                workload.num_candidates,
            )
            result = results.get((embedding, name)) or {"skipped": reasons[name]}
            yield row | result | {"published_ms": published}
    on_group(len(workloads), len(workloads))


def dry_rows(
    workloads: Sequence[GrowingUsers],
    variants: Sequence[str],
    config: ModelConfig,
    itemsize: int,
    *,
    impl: str,
    page_size: int,
    embeddings: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """The cases of a run and what they would cost."""
    for workload in workloads:
        for embedding, name in itertools.product(embeddings, variants):
            flops, num_bytes = workload.cost(config, itemsize, cached=name != BASELINE)
            yield {
                "num_users": workload.num_users,
                "variant": name,
                "embedding": embedding,
                "flops": flops,
                "bytes": num_bytes,
                "memory_bytes": workload.memory_bytes(
                    config, itemsize, page_size, dense=impl == "reference", num_caches=len(embeddings)
                ),
                "speedup_limit": workload.cost(config, itemsize, cached=False)[0] / flops,
            }


def _prepared(
    session: BenchSession,
    workload: GrowingUsers,
    model: RankingModel,
    lookups: Mapping[str, Lookup],
    pool: KVCacheConfig,
    impl: str,
    batches: Sequence[Sequence[UserRequest]],
    key: Key,
) -> _Variant | str:
    """A variant that is ready to be timed, or why there is none: its cache or its graphs cannot be made."""
    embedding, name = key
    try:
        with out_of_memory_named():
            cache = graphs = None
            if name != BASELINE:
                cache = KVCacheManager(pool, model.config, session.dtype, session.backend)
            if name == GRAPH:
                buckets = workload.buckets(model.config)
                graphs = graph_runner(model.layers, cache, impl, buckets, rehearsed_steps=len(batches))
                graphs.capture()
            label = name if len(lookups) == 1 else f"{embedding}, {name}"
            variant = _Variant(key, label, InferenceEngine(model, impl, cache, lookups[embedding], graphs))
            variant.rehearse(batches)
    except OutOfMemoryError:
        return NO_MEMORY
    except CaptureFailedError as error:
        return str(error)
    return NO_MEMORY if graphs is not None and graphs.left_out else variant


def _results(
    session: BenchSession,
    workload: GrowingUsers,
    make: Callable[[Key], _Variant | str],
    keys: Sequence[Key],
    config: ModelConfig,
    exact: InferenceEngine,
    batches: Sequence[Sequence[UserRequest]],
) -> dict[Key, dict[str, Any]]:
    """What became of each variant. Their caches and graphs are gone before the next workload asks for memory."""
    prepared = {key: make(key) for key in keys}
    runs = [run for run in prepared.values() if isinstance(run, _Variant)]
    results: dict[Key, dict[str, Any]] = {
        key: {"skipped": NO_MEMORY if isinstance(run, _Variant) else run} for key, run in prepared.items()
    }
    try:
        with out_of_memory_named():
            return results | (_measured(session, workload, runs, config, exact, batches) if runs else {})
    except OutOfMemoryError:
        return results


def _measured(
    session: BenchSession,
    workload: GrowingUsers,
    runs: Sequence[_Variant],
    config: ModelConfig,
    exact: InferenceEngine,
    batches: Sequence[Sequence[UserRequest]],
) -> dict[Key, dict[str, Any]]:
    """Time the variants, then compare what they computed in the timed run, each with its embedding's baseline."""
    cases = [
        Case(run.name, [partial(run.step, i, requests) for i, requests in enumerate(batches)], run.forget)
        for run in runs
    ]
    group = f"{workload.num_users} users"
    samples = session.measure(group, cases)
    bases = {run.key[0]: run for run in runs if run.key[1] == BASELINE}
    budgets = {
        embedding: session.check_rounding(
            f"{group}, {base.name}", _rounding(base, batches, exact), config.num_layers + AROUND_LAYERS
        )
        for embedding, base in bases.items()
    }
    base_costs = workload.costs(config, session.dtype.itemsize, cached=False)
    measured = {}
    for run in runs:
        embedding, variant = run.key
        base = bases[embedding]
        pairs = [(run.logits[i], base.logits[i]) for i in range(len(batches))]
        errors = [relative_error(torch.from_numpy(own), torch.from_numpy(expected)) for own, expected in pairs]
        session.check(f"{group}, {run.name}", max(errors), budgets[embedding])
        costs = workload.costs(config, session.dtype.itemsize, cached=variant != BASELINE)
        batch_costs = [
            {"flops": own[0], "bytes": own[1], "onload_bytes": 0, "base_flops": theirs[0], "base_bytes": theirs[1]}
            for own, theirs in zip(costs, base_costs, strict=True)
        ]
        sums = {name: sum(batch[name] for batch in batch_costs) for name in batch_costs[0]}
        total = latency_summary(samples[run.name].sum(axis=-1))
        speedup = session.speedup(group, base.name, run.name)
        measured[run.key] = {
            "total_ms": total["p50"],
            "tflops": sums["flops"] / total["p50"] * 1e-9,
            "latency_ms": latency_summary(samples[run.name]),
            "total_latency_ms": total,
            "speedup_vs_baseline": speedup.median,
            "speedup_range": [speedup.low, speedup.high],
            "speedup_limit": sums["base_flops"] / sums["flops"],
            "max_abs_logit_difference": max(float(np.abs(own - expected).max()) for own, expected in pairs),
            **sums,
            "batch_costs": batch_costs,
        }
        session.ceilings.apply(measured[run.key])
        if run.engine.graphs is not None:
            measured[run.key]["cuda_graph"] = run.engine.graphs.summary()
    return measured


def _rounding(base: _Variant, batches: Sequence[Sequence[UserRequest]], exact: InferenceEngine) -> float:
    """The worse relative error of the first user's first and last logits, against the next wider dtype."""
    errors = []
    for index in (0, len(batches) - 1):
        request = batches[index][0]
        own = base.logits[index][: len(request.candidates)]
        errors.append(relative_error(torch.from_numpy(own), torch.from_numpy(exact.step([request]).logits)))
    return max(errors)


def _why_not(session: BenchSession, variant: str, impl: str) -> str | None:
    """Why a variant cannot run here, or None."""
    return (session.backend.why_no_graphs() or why_not_captured(impl, session.backend)) if variant == GRAPH else None
