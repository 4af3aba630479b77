"""`hstu bench-e2e`: the workload, its variants, what they compute, and what is refused."""

import itertools
import json
import weakref
from typing import Any

import numpy as np
import pytest
from support.cli import failure_of, invoke, record_of

import hstu_cli.kvcache.batch as cache_batch
from hstu_cli.bench import e2e, session
from hstu_cli.bench.ceilings import Ceilings
from hstu_cli.bench.e2e import BASELINE, GRAPH, KVCACHE, GrowingUsers
from hstu_cli.bench.published import published_e2e_ms
from hstu_cli.bench.session import BenchSession
from hstu_cli.commands import bench
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.kernels import layer
from hstu_cli.kvcache import KVCacheManager

TINY = MODEL_PRESETS["tiny"]
SMALL = ["bench-e2e", "--config", "tiny", "--history-step", "10", "--num-batches", "5", "--candidates", "9"]


@pytest.mark.parametrize(("dtype", "difference"), [("fp32", 1e-5), ("bf16", 0.2)])
def test_every_variant_of_every_number_of_users_is_a_row(dtype: str, difference: float) -> None:
    record = record_of(*SMALL, "--num-users", "1,3", "--num-iters", "2", "--dtype", dtype)
    rows = record["rows"]
    assert [(row["num_users"], row["variant"]) for row in rows] == [
        (users, variant) for users in (1, 3) for variant in (BASELINE, KVCACHE, GRAPH)
    ]
    for row in rows:
        assert row["batch_size"] == row["num_users"]
        assert row["embedding"] == "torch"
        assert row["published_ms"] is None
        if row["variant"] == GRAPH:
            assert row["skipped"] == "a CPU has no graphs to replay"
            continue
        assert row["max_abs_logit_difference"] <= difference
        assert len(row["latency_ms"]["samples"]) == 2 * 5  # a sample of each batch
        totals = row["total_latency_ms"]["samples"]
        assert totals == pytest.approx(np.reshape(row["latency_ms"]["samples"], (2, 5)).sum(axis=1))
        assert row["total_ms"] == row["total_latency_ms"]["p50"]
        assert (row["speedup_vs_baseline"] == 1) == (row["variant"] == BASELINE)
        assert (row["speedup_limit"] == 1) == (row["variant"] == BASELINE)


def test_the_cache_is_used_and_begins_empty_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch of a round skips nothing, each later one all that the batch before computed."""
    skipped: list[list[int]] = []
    attention = cache_batch.CacheBatch.attention

    def recorded(self, *args, **kwargs):
        skipped.append(self.num_cached_tokens)
        return attention(self, *args, **kwargs)

    monkeypatch.setattr(cache_batch.CacheBatch, "attention", recorded)
    record_of(*SMALL, "--num-users", "2", "--num-iters", "2", "--num-iters-warmup", "1")
    context = TINY.num_context_tokens
    assert skipped == [[n, n] for n in (0, *(context + 10 * i for i in range(1, 5)))] * 3


def test_a_wrong_cached_score_invalidates_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer.paged_attention
    monkeypatch.setattr(layer, "paged_attention", lambda *a, **k: right(*a, **k).flip(-1))
    result = invoke(*SMALL, "--num-users", "1", "--format", "json")
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert record["status"] == "invalid"
    assert "1 users, kvcache: output error" in record["reasons"][0]
    assert record["rows"][1]["max_abs_logit_difference"] > 1e-3


def test_variants_without_the_baseline_are_still_compared_with_it() -> None:
    rows = record_of(*SMALL, "--num-users", "1", "--variants", "kvcache")["rows"]
    assert [row["variant"] for row in rows] == [KVCACHE]
    assert rows[0]["speedup_limit"] > 1


def test_caches_are_gone_before_the_next_workload_asks_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[KVCacheManager]] = []
    alive: list[int] = []

    class Followed(KVCacheManager):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    lacking = BenchSession.memory_lacking

    def counted(self: BenchSession, num_bytes: float) -> str | None:
        alive.append(sum(cache() is not None for cache in made))
        return lacking(self, num_bytes)

    monkeypatch.setattr(e2e, "KVCacheManager", Followed)
    monkeypatch.setattr(BenchSession, "memory_lacking", counted)
    record_of(*SMALL, "--num-users", "1,2,3", "--num-iters", "1")
    assert (len(made), alive) == (3, [0, 0, 0])


def test_the_workload_is_the_published_one() -> None:
    workload = GrowingUsers(num_users=2, history_step=256, num_batches=16, num_candidates=256)
    batches = workload.requests(MODEL_PRESETS["benchmark"], seed=0)
    assert [len(batch) for batch in batches] == [2] * 16
    assert [2 * len(batch[1].video_ids) for batch in batches] == list(range(256, 4097, 256))
    assert all(len(request.candidates) == 256 for batch in batches for request in batch)
    for earlier, later in itertools.pairwise(batches):
        for a, b in zip(earlier, later, strict=True):
            assert np.array_equal(b.video_ids[: len(a.video_ids)], a.video_ids)
    assert published_e2e_ms("l20", 8, BASELINE, 256, 16, 256) == 412
    assert published_e2e_ms("l20", 8, BASELINE, 256, 16, 100) is None
    assert published_e2e_ms("h100", 8, BASELINE, 256, 16, 256) is None


def test_dry_run_lists_costs_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((bench, "measure_ceilings"), (e2e, "benchmark_model"), (session, "measure")):
        monkeypatch.setattr(module, name, None)  # who calls it fails
    rows = record_of("bench-e2e", "--dry-run")["rows"]
    assert [(row["num_users"], row["variant"]) for row in rows][:4] == [
        (1, BASELINE), (1, KVCACHE), (1, GRAPH), (2, BASELINE),
    ]  # fmt: skip
    assert rows[1]["speedup_limit"] == pytest.approx(4.12, abs=0.005)
    assert "latency_ms" not in rows[0]


def test_the_default_run_shrinks_until_it_fits_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CPU_SECONDS", 0.0)
    record = record_of(*SMALL)
    assert record["scaled"].startswith("1 of 1,2,4,8 users, timed rounds: 1")
    assert {row["num_users"] for row in record["rows"]} == {1}
    chosen = record_of(*SMALL, "--num-users", "2", "--num-iters", "2")
    assert "scaled" not in chosen
    assert len(record_of(*SMALL, "--full", "--variants", "baseline")["rows"]) == 4


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        (2, ["--num-users", "0"], "--num-users takes numbers from 1"),
        (2, ["--history-step", "3"], "the step must be even"),
        (2, ["--history-step", "512"], "beyond the model's window of 2,048"),
        (2, ["--variants", "kvcache,magic"], "--variants knows baseline, kvcache, kvcache+graph, not 'magic'"),
        (2, ["--embedding", "hash"], "choose from auto, torch, torchrec, dynamicemb"),
        (3, ["--embedding", "torch,dynamicemb", "--device", "cpu"], "--embedding dynamicemb"),
        (2, ["--plot", "x.pdf"], ".png, .svg, .html"),
        (2, ["--candidates", "0"], "--candidates"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_message(code: int, options: list[str], message: str) -> None:
    assert message in failure_of(code, "bench-e2e", *options)


def test_plots_show_totals_and_speedups(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "chart.html"
    record_of(*SMALL, "--num-users", "1,2", "--plot", path)
    text = path.read_text()
    assert "Total of all batches" in text
    assert "<svg" in text


def test_the_least_time_is_the_sum_of_the_batches() -> None:
    """A workload whose first batch is bound by bandwidth and whose last one by computing."""
    record = record_of(*SMALL, "--num-users", "2", "--variants", "baseline,kvcache")
    costs = GrowingUsers(2, 10, 5, 9).costs(TINY, 4, cached=True)
    flops, num_bytes = zip(*costs, strict=True)
    middle = max(flops) / max(num_bytes)  # FLOPs for each byte at which the two take equally long
    ceilings = Ceilings(middle * 1e9, 1e9, None, 1e9, 1e9, 1, 1)
    for row in record["rows"]:
        ceilings.apply(row)
        assert {name: sum(batch[name] for batch in row["batch_costs"]) for name in row["batch_costs"][0]} == {
            name: row[name] for name in ("flops", "bytes", "onload_bytes", "base_flops", "base_bytes")
        }

        def least_ms(prefix: str, row: dict[str, Any] = row) -> float:
            pairs = [(batch[f"{prefix}flops"], batch[f"{prefix}bytes"]) for batch in row["batch_costs"]]
            return sum(max(flops / middle, num_bytes) for flops, num_bytes in pairs) / 1e6

        assert row["roofline_fraction"] == pytest.approx(least_ms("") / row["total_ms"])
        assert row["speedup_limit_roofline"] == pytest.approx(least_ms("base_") / least_ms(""))
    cached = record["rows"][1]
    assert [(batch["flops"], batch["bytes"]) for batch in cached["batch_costs"]] == costs
    assert least_ms("", cached) > max(sum(flops) / middle, sum(num_bytes)) / 1e6  # of sums, it would be less


def test_many_candidates_are_scored_in_one_pass() -> None:
    """Otherwise the baseline recomputes the history for each chunk, and beats a limit that does not count that."""
    arguments = ["--history-step", "10", "--num-batches", "2", "--candidates", "90", "--num-users", "1"]
    record = record_of("bench-e2e", "--config", "tiny", *arguments, "--num-iters", "1")
    assert TINY.max_candidates < record["model"]["max_candidates"] == 90
    assert "No case could run" in invoke("bench-e2e", "--config", "tiny", *arguments, "--variants", GRAPH).stderr
