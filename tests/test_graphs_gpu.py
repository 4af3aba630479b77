"""On an NVIDIA GPU: replays are the captured work bit for bit, scores stay right, and copies hide behind layers."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cli import record_of
from support.growing_users import CONFIG, NUM_USERS, Users, relative, small_model

from hstu_cli.backend import CudaBackend, Event
from hstu_cli.bench.block import BlockWorkload, random_block
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.kernels.append_pages import choose_append_impl
from hstu_cli.kernels.dispatch import choose_impl
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.kvcache.manager import kv_bytes_per_token
from hstu_cli.model.buckets import Bucket, default_buckets
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.graphs import GraphRunner, choose_graphs

pytestmark = pytest.mark.gpu

PAGE_SIZE = 16
BUCKETS = (Bucket(7, 4), Bucket(24, 2), Bucket(60, 4))
DTYPES = [torch.float32, torch.bfloat16]


def engines(
    dtype: torch.dtype, *, host_pages: int = 0, num_pages: int = 40, buckets: tuple[Bucket, ...] = BUCKETS
) -> tuple[InferenceEngine, InferenceEngine, InferenceEngine]:
    """One on graphs, one without a cache, and one whose results count as exact, all with the same weights."""
    backend = CudaBackend()
    impl = choose_impl("auto", "cuda").name
    exact = small_model(seed=0).double()
    model = copy.deepcopy(exact).to(backend.device, dtype)
    host_bytes = host_pages * PAGE_SIZE * kv_bytes_per_token(CONFIG, dtype)
    cache = KVCacheManager(KVCacheConfig(num_pages, PAGE_SIZE, host_bytes), CONFIG, dtype, backend)
    assert choose_graphs(True, backend, impl, cached=True).enabled
    runner = GraphRunner(model.layers, cache, impl, buckets)
    runner.capture()
    assert not runner.left_out
    return (
        InferenceEngine(model, impl, cache, graphs=runner),
        InferenceEngine(model, impl),
        InferenceEngine(exact, "reference"),
    )


def random_steps(seed: int, count: int) -> list[dict[int, tuple[int, int]]]:
    """So many new events and candidates for some users, step by step."""
    rng = np.random.default_rng(seed)
    return [
        {int(u): (int(rng.integers(0, 12)), int(rng.integers(1, 14))) for u in rng.permutation(NUM_USERS)[: 1 + i % 5]}
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_pages", "host_pages"), [(40, 0), (12, 0), (12, 30)], ids=["ample", "small", "host"])
def test_scores_from_graphs_are_the_uncached_ones(dtype: torch.dtype, num_pages: int, host_pages: int) -> None:
    """Within twice the error that the uncached ones have against float64, over all steps."""
    engine, uncached, exact = engines(dtype, num_pages=num_pages, host_pages=host_pages)
    users = Users(np.random.default_rng(0))
    found: dict[str, list[np.ndarray]] = {"graphs": [], "uncached": [], "exact": []}
    for sizes in random_steps(seed=1, count=40):
        requests = users.requests(sizes)
        for name, one in (("graphs", engine), ("uncached", uncached), ("exact", exact)):
            found[name].append(one.step(requests).logits.ravel())
        engine.cache.check_invariants()
    values = {name: np.concatenate(parts) for name, parts in found.items()}
    budget = 2 * (relative(values["uncached"], values["exact"]) + torch.finfo(dtype).eps)
    assert relative(values["graphs"], values["exact"]) <= budget
    counters = engine.cache.counters
    assert engine.graphs.replays > 20
    assert engine.graphs.eager_steps > 0
    assert (counters.evictions > 0) == (num_pages == 12)
    assert (counters.host_hit_tokens > 0) == (host_pages > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host_pages", [0, 30], ids=["one graph", "a graph for each layer"])
def test_a_replay_is_the_captured_work_bit_for_bit(dtype: torch.dtype, host_pages: int) -> None:
    """Padding included: the same kernels on the same buffers, launched one by one and replayed."""
    engine, _, _ = engines(dtype, host_pages=host_pages)
    runner = engine.graphs
    replay, compared = runner.run, []

    def both(x: torch.Tensor, attention: object) -> torch.Tensor:
        bucket = runner.size_for(attention)
        if bucket is not None:
            runner._load(bucket, x, attention)
            hidden = runner._x[: bucket.num_tokens].clone()
            with torch.no_grad():
                for index, layer in enumerate(runner.layers):
                    hidden = layer(hidden, runner.static_attention(bucket), index)
        output = replay(x, attention)
        if bucket is not None:
            compared.append(torch.equal(output, hidden[: len(x)]))
        return output

    runner.run = both
    users = Users(np.random.default_rng(2))
    for sizes in random_steps(seed=3, count=12):
        engine.step(users.requests(sizes))
    assert len(compared) > 5
    assert all(compared)


def test_graphs_share_the_memory_of_the_largest() -> None:
    engine, _, _ = engines(torch.bfloat16, buckets=(Bucket(2048, 4),))
    one = engine.graphs.summary()["memory_bytes"]
    several, _, _ = engines(torch.bfloat16, buckets=(Bucket(512, 4), Bucket(1024, 4), Bucket(2048, 4)))
    assert several.graphs.summary()["memory_bytes"] < 1.5 * one
    assert several.graphs.summary()["captured_graphs"] == 3


class TimedCopies(CudaBackend):
    """Notes when each copy ends, on the copy stream."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[torch.cuda.Event] = []

    def submit_copy(self, copy: Callable[[], None], *, to_host: bool, after: Sequence[Event] = ()) -> Event:
        def timed() -> None:
            copy()
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()

        return super().submit_copy(timed, to_host=to_host, after=after)


def test_copies_of_later_layers_run_while_earlier_layers_compute() -> None:
    """Cached tokens of eight users come from host memory: 134 MB a layer, far longer than the layer itself takes."""
    backend, config = TimedCopies(), MODEL_PRESETS["benchmark"]
    block = random_block(config, backend, torch.bfloat16, seed=0)
    workload = BlockWorkload(
        block, config, backend, batch_size=8, num_history=4096, num_candidates=256, page_size=32, seed=0,
        append_impl=choose_append_impl("auto", "cuda", torch.bfloat16, head_dim=config.head_dim).name,
    )  # fmt: skip
    impl = choose_impl("auto", "cuda").name
    workload.uncached(workload.new_tokens(0), impl)
    workload.copy_to_host()
    tokens = workload.new_tokens(3968)
    workload.cached(tokens, 3968, impl, from_host=True)  # loads and tunes
    torch.cuda.synchronize()
    backend.ends.clear()
    layer_ends: list[torch.cuda.Event] = []

    def note(*_: object) -> None:
        layer_ends.append(torch.cuda.Event(enable_timing=True))
        layer_ends[-1].record()

    handles = [layer.register_forward_hook(note) for layer in block]
    workload.cached(tokens, 3968, impl, from_host=True)
    torch.cuda.synchronize()
    for handle in handles:
        handle.remove()
    assert len(backend.ends) == len(layer_ends) == config.num_layers
    for copied, computed in zip(backend.ends, layer_ends, strict=True):
        assert copied.elapsed_time(computed) > 0, "a layer is done after its own pages are there"
    for computed, next_copied in zip(layer_ends, backend.ends[1:], strict=False):
        assert computed.elapsed_time(next_copied) > 0, "and before the next layer's are"


def test_infer_uses_graphs(tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="duckdb is not installed, and preparing data needs it")
    from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic

    prepare_synthetic(tmp_path, SyntheticOptions(num_users=20, num_events=250, num_items=300, shape="1k"))
    record = record_of(
        "infer", "--config", "tiny", "--data-root", tmp_path, "--steps", 40, "--batch-size", 8, "--num-pages", 40,
        "--host-cache-gb", 0.01, "--verify-cache", 5, "--cuda-graph", "--device", "cuda",
    )  # fmt: skip
    assert record["cuda_graph"]["enabled"]
    assert record["cuda_graph"]["layerwise"]
    assert record["cuda_graph"]["replays"] > 0
    assert len(record["cuda_graph"]["buckets"]) == len(default_buckets(MODEL_PRESETS["tiny"], 8))


def test_bench_e2e_uses_graphs() -> None:
    rows = record_of(
        "bench-e2e", "--config", "tiny", "--history-step", "10", "--num-batches", "5", "--candidates", "9",
        "--num-users", "1,3", "--num-iters", "2", "--device", "cuda",
    )["rows"]  # fmt: skip
    graphs = [row["cuda_graph"] for row in rows if row["variant"] == "kvcache+graph"]
    assert len(graphs) == 2
    assert all(row["replays"] == 5 * 3 and row["eager_steps"] == 0 for row in graphs)
