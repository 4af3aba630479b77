"""`bench-layer`: the block over history, cached tokens, candidates and batch size, against recomputing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from hstu_cli.bench.block import BlockWorkload, random_block
from hstu_cli.bench.published import published_layer
from hstu_cli.bench.session import BenchSession, OutOfMemoryError, Progress, out_of_memory_named, relative_error
from hstu_cli.config import ModelConfig
from hstu_cli.errors import UsageError
from hstu_cli.model.cost import SequenceShape, activation_bytes, block_bytes, block_flops, block_parameters
from hstu_cli.timing import Case, latency_summary

EAGER = "eager"
"""The plain PyTorch composition as a peer: the reference implementation of every operator."""


DENSE = (EAGER, "reference")
"""Implementations that hold whole score matrices."""


@dataclass(frozen=True, slots=True)
class LayerGrid:
    """The cases of a run: every combination. `cached` holds tokens or shares of the history."""

    histories: tuple[int, ...]
    cached: tuple[int | Fraction, ...]
    candidates: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    from_host: bool = False
    compare_eager: bool = False

    def groups(self) -> list["LayerGroup"]:
        """The cases to compare with one another, group by group; UsageError for one that cannot be."""
        return [
            LayerGroup(batch, history, candidates, self._cached_lengths(history, candidates))
            for candidates in self.candidates
            for batch in self.batch_sizes
            for history in self.histories
        ]

    def _cached_lengths(self, history: int, candidates: int) -> tuple[int, ...]:
        """Cached tokens of the group, ascending; 0 always, it is what the others are compared with."""
        lengths = {0}
        for cached in self.cached:
            length = int(cached * history) if isinstance(cached, Fraction) else cached
            if length > history:
                raise UsageError(f"--cached {cached} is more than --history {history}.")
            if length == history and not candidates:
                raise UsageError(f"--cached {cached} of --history {history} leaves nothing to compute.")
            lengths.add(length)
        return tuple(sorted(lengths))


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Cases that differ in their cached tokens alone: they run in turn and are compared with the first."""

    batch_size: int
    history: int
    candidates: int
    cached: tuple[int, ...]

    @property
    def name(self) -> str:
        """As warnings and traces call it."""
        return f"batch {self.batch_size}, history {self.history}, candidates {self.candidates}"

    def shapes(self, num_cached: int) -> list[SequenceShape]:
        """The sequences of one case."""
        return [SequenceShape(self.history, num_cached, self.candidates)] * self.batch_size

    def cost(self, config: ModelConfig, num_cached: int, itemsize: int) -> tuple[int, int]:
        """FLOPs and bytes of one case."""
        shapes = self.shapes(num_cached)
        return block_flops(config, shapes), block_bytes(config, shapes, itemsize, stored=num_cached > 0)

    def onload_bytes(self, config: ModelConfig, num_cached: int, itemsize: int) -> int:
        """Bytes that come from host memory where the cached tokens are there."""
        return self.batch_size * num_cached * config.kv_elements_per_token * itemsize

    def memory_bytes(self, config: ModelConfig, itemsize: int, page_size: int, *, dense: bool, from_host: bool) -> int:
        """About what the group needs at a time: weights, inputs and outputs, pages, intermediates."""
        tokens = self.batch_size * (self.history + self.candidates)
        pages = self.batch_size * -(-self.history // page_size)
        exact_weights = block_parameters(config) * max(4, 2 * itemsize)
        return (
            itemsize * (block_parameters(config) + 4 * tokens * config.hidden_dim)
            + exact_weights
            + itemsize * pages * page_size * config.kv_elements_per_token * (2 if from_host else 1)
            + 2 * activation_bytes(config, self.shapes(0), itemsize, dense=dense)
        )


def scaled_grid(grid: LayerGrid, free: set[str], seconds: float, estimate: Callable[[LayerGroup], float]) -> LayerGrid:
    """The grid without its largest batch sizes, then histories, until its estimated time fits into `seconds`.

    free: names of the fields that may shrink, those that the user did not choose.
    """
    for name in ("batch_sizes", "histories", "candidates"):
        while name in free and len(getattr(grid, name)) > 1 and sum(map(estimate, grid.groups())) > seconds:
            grid = replace(grid, **{name: tuple(sorted(getattr(grid, name))[:-1])})
    return grid


def run_layer_benchmark(
    session: BenchSession,
    config: ModelConfig,
    grid: LayerGrid,
    *,
    impl: str,
    append_impl: str,
    page_size: int,
    seed: int,
    preset: str | None,
    on_group: Progress = lambda done, total: None,
) -> Iterator[dict[str, Any]]:
    """Time every case and yield its row as soon as its group is done. preset: whose published figures to add."""
    block = random_block(config, session.backend, session.dtype, seed)
    groups = grid.groups()
    for done, group in enumerate(groups):
        on_group(done, len(groups))
        impls = []
        for name in (impl, EAGER) if grid.compare_eager else (impl,):
            needed = group.memory_bytes(
                config, session.dtype.itemsize, page_size, dense=name in DENSE, from_host=grid.from_host
            )
            lacking = session.memory_lacking(needed)
            if lacking is None:
                impls.append(name)
            else:
                yield from (_row(group, c, grid, name) | {"skipped": lacking} for c in group.cached)
        if impl not in impls:
            continue
        try:
            with out_of_memory_named():
                workload = BlockWorkload(
                    block,
                    config,
                    session.backend,
                    batch_size=group.batch_size,
                    num_history=group.history,
                    num_candidates=group.candidates,
                    page_size=page_size,
                    seed=seed,
                    append_impl=append_impl,
                )
                rows = _measured_rows(session, grid, group, workload, impls, preset)
        except OutOfMemoryError:
            rows = [
                _row(group, c, grid, name) | {"skipped": "ran out of memory"} for name in impls for c in group.cached
            ]
        workload = None  # before the next one is judged by the memory that is left
        yield from rows
    on_group(len(groups), len(groups))


def dry_rows(
    grid: LayerGrid, config: ModelConfig, itemsize: int, *, impl: str, page_size: int
) -> Iterator[dict[str, Any]]:
    """The cases of a grid and what they would cost; memory is that of the case's group."""
    for group in grid.groups():
        for name in (impl, EAGER) if grid.compare_eager else (impl,):
            memory = group.memory_bytes(config, itemsize, page_size, dense=name in DENSE, from_host=grid.from_host)
            for num_cached in group.cached:
                flops, num_bytes = group.cost(config, num_cached, itemsize)
                yield _row(group, num_cached, grid, name) | {
                    "flops": flops,
                    "bytes": num_bytes,
                    "memory_bytes": memory,
                    "speedup_limit": group.cost(config, 0, itemsize)[0] / flops,
                }


def _measured_rows(
    session: BenchSession,
    grid: LayerGrid,
    group: LayerGroup,
    workload: BlockWorkload,
    impls: Sequence[str],
    preset: str | None,
) -> list[dict[str, Any]]:
    """Check and time the cases of one group; the first of `impls` is ours."""
    config, itemsize = workload.config, session.dtype.itemsize
    keys = [(name, num_cached) for name in impls for num_cached in group.cached]
    runs = {key: _runner(workload, *key, from_host=grid.from_host) for key in keys}
    errors = _checked(session, grid, group, workload, runs)
    samples = session.measure(group.name, [Case(_case_name(*key), [run]) for key, run in runs.items()])
    rows = []
    for name, num_cached in keys:
        flops, num_bytes = group.cost(config, num_cached, itemsize)
        base_flops, base_bytes = group.cost(config, 0, itemsize)
        speedup = session.speedup(group.name, _case_name(name, 0), _case_name(name, num_cached))
        latency = latency_summary(samples[_case_name(name, num_cached)].sum(axis=-1))
        theirs = preset if name == impls[0] and not grid.from_host else None  # their keys and values are on the device
        published = published_layer(theirs, group.history, num_cached, group.candidates, group.batch_size)
        row = _row(group, num_cached, grid, name) | {
            "latency_ms": latency,
            "tflops": flops / latency["p50"] * 1e-9,
            "speedup_vs_uncached": speedup.median,
            "speedup_range": [speedup.low, speedup.high],
            "speedup_limit": base_flops / flops,
            "output_error": errors[name, num_cached],
            "flops": flops,
            "bytes": num_bytes,
            "onload_bytes": group.onload_bytes(config, num_cached, itemsize) if grid.from_host else 0,
            "base_flops": base_flops,
            "base_bytes": base_bytes,
            "published_ms": published.latency_ms,
            "published_speedup": published.speedup,
        }
        session.ceilings.apply(row)
        rows.append(row)
    return rows


def _checked(
    session: BenchSession,
    grid: LayerGrid,
    group: LayerGroup,
    workload: BlockWorkload,
    runs: dict[tuple[str, int], Callable[[], torch.Tensor]],
) -> dict[tuple[str, int], float]:
    """Relative error of each case against the uncached result; that one's own against a wider dtype.

    A case may be off by twice what the uncached result is, and rounding. Fills the pages.
    """
    ours = next(iter(runs))[0]
    everything = workload.new_tokens(0)
    rows_of = (group.batch_size, group.history + group.candidates, -1)
    uncached = workload.uncached(everything, ours).view(rows_of)  # [B, n + c, D]
    rounding = relative_error(uncached[0], workload.exact_first(ours))
    budget = session.check_rounding(group.name, rounding, workload.config.num_layers)
    workload.cached(everything, 0, ours)
    if grid.from_host:
        workload.copy_to_host()
    errors = {}
    for (name, num_cached), run in runs.items():
        if grid.from_host:
            workload.forget_device_pages()
        error = relative_error(run(), uncached[:, num_cached:].flatten(0, 1))
        session.check(f"{group.name}, {_case_name(name, num_cached)}", error, budget)
        errors[name, num_cached] = rounding if (name, num_cached) == (ours, 0) else error
    return errors


def _runner(workload: BlockWorkload, name: str, num_cached: int, *, from_host: bool) -> Callable[[], torch.Tensor]:
    """What is timed: one pass of the block over the tokens that are not cached."""
    impl = "reference" if name == EAGER else name
    tokens = workload.new_tokens(num_cached)
    if not num_cached:
        return partial(workload.uncached, tokens, impl)
    return partial(workload.cached, tokens, num_cached, impl, from_host=from_host)


def _case_name(name: str, num_cached: int) -> str:
    return f"{name}, cached {num_cached}"


def _row(group: LayerGroup, num_cached: int, grid: LayerGrid, impl: str) -> dict[str, Any]:
    """What names a row."""
    return {
        "batch_size": group.batch_size,
        "history_length": group.history,
        "cached_length": num_cached,
        "num_candidates": group.candidates,
        "cache_tier": ("host" if grid.from_host else "device") if num_cached else None,
        "impl": impl,
    }
