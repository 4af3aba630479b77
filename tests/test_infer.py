"""`hstu infer`: what it scores, that it scores it the same every time, and what its record says."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SAMPLE_MD5
from support.cli import invoke, record_of

from hstu_cli.backend import Backend
from hstu_cli.bench.requests import RequestSource
from hstu_cli.bench.setup import random_model_for
from hstu_cli.config import MODEL_PRESETS, TASKS
from hstu_cli.data.dataset import PreparedDataset
from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic
from hstu_cli.kernels.dispatch import choose_impl
from hstu_cli.model import RankingModel, save_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic users with sessions: histories past the window, requests past max_candidates."""
    root = tmp_path_factory.mktemp("data")
    prepare_synthetic(root, SyntheticOptions(num_users=12, num_events=300, num_items=400, shape="1k"))
    return root


def tiny(root: Path, *arguments: object) -> list[object]:
    return ["infer", "--config", "tiny", "--data-root", root, *arguments]


def predictions(root: Path, path: Path, *arguments: object) -> dict[str, np.ndarray]:
    """The prediction columns of a run."""
    record_of(*tiny(root, "--predictions-out", path, *arguments))
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def test_predictions_are_every_request_and_candidate_in_order(root: Path, tmp_path: Path) -> None:
    found = predictions(root, tmp_path / "p.parquet")
    dataset = PreparedDataset(root, "synthetic")
    timeline = dataset.requests()
    sequences = {row["user_id"]: row for row in pq.read_table(root / "synthetic" / "sequences.parquet").to_pylist()}
    rows: list[tuple[int, int, int, int]] = []
    for request, user, start, count in zip(
        timeline.request_id, timeline.user_id, timeline.history_end, timeline.num_candidates, strict=True
    ):
        events = sequences[user]
        rows += [
            (request, user, events["video_id"][i], events["action_weights"][i]) for i in range(start, start + count)
        ]
    columns = ("request_id", "user_id", "video_id", "label")
    assert list(zip(*(found[name].tolist() for name in columns), strict=True)) == rows
    assert list(found) == [*columns, *(f"logit_{task}" for task in TASKS)]
    assert max(timeline.num_candidates) > MODEL_PRESETS["tiny"].max_candidates
    assert all(np.isfinite(found[f"logit_{task}"]).all() for task in TASKS)


def test_two_runs_write_the_same_bytes(root: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path in paths:
        predictions(root, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.parquet*")) == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_batch_size_does_not_change_scores(root: Path, tmp_path: Path, dtype: str) -> None:
    runs = [
        predictions(root, tmp_path / f"{size}.parquet", "--batch-size", size, "--dtype", dtype) for size in (1, 7, 32)
    ]
    tolerance = {"fp32": 1e-5, "bf16": 3e-2}[dtype]
    for run in runs[1:]:
        for name, column in run.items():
            if name.startswith("logit"):
                np.testing.assert_allclose(column, runs[0][name], atol=tolerance, rtol=tolerance)
            else:
                np.testing.assert_array_equal(column, runs[0][name])


def test_implementations_agree(root: Path, tmp_path: Path) -> None:
    blocked, reference = (
        predictions(root, tmp_path / f"{impl}.parquet", "--impl", impl) for impl in ("blocked", "reference")
    )
    for task in TASKS:
        np.testing.assert_allclose(blocked[f"logit_{task}"], reference[f"logit_{task}"], atol=1e-5, rtol=1e-5)


def test_seed_changes_the_random_model(root: Path, tmp_path: Path) -> None:
    first, second = (predictions(root, tmp_path / f"{seed}.parquet", "--seed", seed) for seed in (0, 1))
    assert np.abs(first["logit_is_click"] - second["logit_is_click"]).max() > 0.01


def test_metrics_follow_from_the_predictions(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    record = record_of(*tiny(root, "--predictions-out", path, "--top-k", 20))
    table = pq.read_table(path)
    click = (table["label"].to_numpy() & 1).astype(bool)
    logit = table["logit_is_click"].to_numpy()
    below = (logit[click][:, None] > logit[~click][None, :]).mean()
    ties = (logit[click][:, None] == logit[~click][None, :]).mean()
    assert record["metrics"]["auc"]["is_click"] == pytest.approx(below + ties / 2, abs=1e-6)
    assert list(record["metrics"]["hit_rate"]) == ["1", "5", "10", "20", "50"]
    assert list(record["metrics"]["ndcg"]) == ["1", "5", "10", "20", "50"]
    assert record["metrics"]["num_predictions"] == record["num_requests"]


def test_metrics_of_a_model_that_knows_the_next_item(root: Path, tmp_path: Path) -> None:
    """Every token and every position embeds to the same row as the one video that is always next."""
    dataset = PreparedDataset(root, "synthetic")
    model = random_model_for(dataset, MODEL_PRESETS["tiny"], Backend(), seed=0)
    target = int(dataset.events(dataset.requests().user_id).video_id[0])
    with torch.no_grad():
        for table in model.embeddings.values():
            table.weight.copy_(torch.randn_like(table.weight) * 1e-3)
        row = int(model.embeddings["video_id"].rows_of(torch.tensor([target])))
        model.position.weight.copy_(torch.ones_like(model.position.weight))
        model.embeddings["video_id"].weight[row] = 1.0
        for layer in model.layers:
            layer.output.weight.zero_()  # the block passes its input through
    save_checkpoint(model, tmp_path / "model")
    found = predictions(root, tmp_path / "p.parquet", "--checkpoint", tmp_path / "model")
    record = record_of(*tiny(root, "--checkpoint", tmp_path / "model"))
    first_of_request = np.unique(found["request_id"], return_index=True)[1]
    expected = (found["video_id"][first_of_request] == target).mean()
    assert expected > 0
    assert record["metrics"]["hit_rate"]["1"] == pytest.approx(expected)
    assert record["model"]["weights"] == "checkpoint"


def test_checkpoint_scores_like_the_model_it_was_saved_from(root: Path, tmp_path: Path) -> None:
    dataset = PreparedDataset(root, "synthetic")
    model: RankingModel = random_model_for(dataset, MODEL_PRESETS["tiny"], Backend(), seed=0)
    save_checkpoint(model, tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    random = predictions(root, tmp_path / "random.parquet", "--steps", 3)
    for checkpoint in ("folder", "model.pt"):
        loaded = predictions(root, tmp_path / "loaded.parquet", "--steps", 3, "--checkpoint", tmp_path / checkpoint)
        for name, column in random.items():
            np.testing.assert_array_equal(loaded[name], column)


def test_batches_are_consecutive_requests_of_distinct_users(root: Path) -> None:
    source = RequestSource(PreparedDataset(root, "synthetic"), MODEL_PRESETS["tiny"])
    batches = list(source.batches(8, None))
    assert [i for batch in batches for i in batch] == list(range(len(source)))
    user_id = source.timeline.user_id
    for batch in batches:
        assert len(set(user_id[batch.start : batch.stop])) == len(batch) <= 8
        closed_early = len(batch) < 8 and batch.stop < len(source)
        assert not closed_early or user_id[batch.stop] in user_id[batch.start : batch.stop]
    assert any(len(batch) < 8 for batch in batches[:-1])


def test_steps_counts_batches(root: Path) -> None:
    record = record_of(*tiny(root, "--steps", 3, "--batch-size", 4))
    assert record["num_batches"] == len(record["latency_ms"]["samples"]) == 3
    assert record["num_requests"] <= 12


def test_period_bounds_requests_but_not_history(root: Path, tmp_path: Path) -> None:
    timeline = pq.read_table(root / "synthetic" / "requests.parquet").to_pydict()
    # 2022-04-15 and 2022-04-20, midnight UTC+8.
    first_ms, last_ms = 1_649_952_000_000, 1_650_384_000_000
    inside = [
        i for i, ms in zip(timeline["request_id"], timeline["request_time_ms"], strict=True) if first_ms <= ms < last_ms
    ]
    everything = predictions(root, tmp_path / "all.parquet")
    period = predictions(root, tmp_path / "period.parquet", "--from", "2022-04-15", "--until", "2022-04-20")
    assert sorted(set(period["request_id"].tolist())) == inside
    same = np.isin(everything["request_id"], inside)
    np.testing.assert_allclose(period["logit_is_like"], everything["logit_is_like"][same], atol=1e-5)


def test_period_bounds_are_inclusive_and_exclusive_to_the_millisecond(root: Path) -> None:
    times = pq.read_table(root / "synthetic" / "requests.parquet")["request_time_ms"].to_pylist()
    dataset = PreparedDataset(root, "synthetic")
    found = dataset.requests(from_ms=times[5], until_ms=times[9])
    assert found.request_id.tolist() == [i for i, ms in enumerate(times) if times[5] <= ms < times[9]]
    assert len(dataset.requests(from_ms=times[-1] + 1)) == 0
    assert dataset.requests(from_ms=times[5], limit=3).request_id.tolist() == [5, 6, 7]


def test_record_has_the_promised_fields(root: Path) -> None:
    record = record_of(*tiny(root, "--steps", 2, "--metadata", "who=me", "--metadata", "why=a=b"))
    assert record["schema_version"] == 1
    assert (record["command"], record["status"], record["reasons"]) == ("infer", "valid", [])
    assert record["metadata"] == {"who": "me", "why": "a=b"}
    assert record["args"]["steps"] == 2
    assert record["dataset"] == {"name": "synthetic", "path": str(root / "synthetic")}
    assert record["device"]["impl"] == choose_impl("auto", "cpu").name
    assert {"requested", "actual", "name", "dtype", "impl", "impl_reason"} == set(record["device"])
    assert {"python", "torch", "triton", "torchrec", "os", "cpu", "threads", "git_commit"} <= set(record["env"])
    assert {"device_name", "device_memory_bytes"} <= set(record["env"])
    assert record["model"]["weights"] == "random"
    latency = record["latency_ms"]
    assert set(latency) == {"avg", "p50", "p90", "p95", "p99", "min", "max", "samples"}
    assert latency["min"] <= latency["p50"] <= latency["p99"] <= latency["max"]
    assert record["throughput_rps"] == pytest.approx(record["num_requests"] / sum(latency["samples"]) * 1e3)
    assert record["vocab_size"] == len(PreparedDataset(root, "synthetic").video_ids())
    assert set(record["metrics"]["auc"]) == set(TASKS)


def test_tasks_with_one_class_are_null_with_the_reason(root: Path) -> None:
    record = record_of(*tiny(root, "--steps", 1, "--batch-size", 1))
    metrics = record["metrics"]
    nulls = {task for task, auc in metrics["auc"].items() if auc is None}
    assert "is_hate" in nulls
    assert set(metrics["auc_reason"]) == nulls
    assert metrics["auc_reason"]["is_hate"] == "every candidate has is_hate 0"


def test_rich_output_is_tables_and_then_json(root: Path, tmp_path: Path) -> None:
    result = invoke(*tiny(root, "--steps", 2, "--dump-logits", "--output-json", tmp_path / "record.json"))
    assert result.exit_code == 0, result.output
    assert "batch 1: logits [" in result.stdout
    assert "hit rate" in result.stdout
    summary = json.loads(result.stdout[result.stdout.index("\n{") :])
    saved = json.loads((tmp_path / "record.json").read_text())
    assert len(saved["latency_ms"]["samples"]) == 2
    del saved["latency_ms"]["samples"]
    assert summary == saved


def test_json_output_is_one_object_even_with_dumped_shapes(root: Path) -> None:
    result = invoke(*tiny(root, "--steps", 2, "--dump-logits", "--format", "json"))
    assert json.loads(result.stdout)["status"] == "valid"
    assert "batch 0: logits [" in result.stderr


def test_underscores_and_short_names_are_accepted(root: Path) -> None:
    record = record_of(
        "infer", "--data_root", root, "--dataset", "Synthetic", "--config", "tiny", "--batch_size", 2, "--steps", 1
    )
    assert record["batch_size"] == 2


def test_without_data_a_synthetic_set_is_made_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    result = invoke("infer", "--config", "tiny", "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "synthetic" in result.stderr
    assert "random" in result.stderr
    record = record_of("infer", "--config", "tiny", "--steps", 2)
    assert record["dataset"] == {"name": "synthetic", "path": str(tmp_path / "cache" / "hstu" / "synthetic")}


def test_last_prepared_set_is_the_default(tmp_path: Path) -> None:
    prepare_synthetic(tmp_path, SyntheticOptions(num_users=3, num_events=10))
    (tmp_path / "synthetic").rename(tmp_path / "kuairand-pure")  # an older set of another name
    prepare_synthetic(tmp_path, SyntheticOptions(num_users=3, num_events=10, seed=1))
    assert record_of(*tiny(tmp_path))["dataset"]["name"] == "synthetic"
    assert record_of(*tiny(tmp_path, "--dataset", "pure"))["dataset"]["name"] == "kuairand-pure"


def test_real_rows_of_one_day(sample_archive: Path, tmp_path: Path) -> None:
    prepared = record_of(
        "preprocess", "kuairand", "--dataset", "pure", "--archive", sample_archive, "--md5", SAMPLE_MD5,
        "--data-root", tmp_path,
    )  # fmt: skip
    assert prepared["num_requests"] == 814_114
    record = record_of(*tiny(tmp_path, "--from", "2022-05-08", "--batch-size", 64))
    times = pq.read_table(tmp_path / "kuairand-pure" / "requests.parquet")["request_time_ms"].to_numpy()
    assert record["num_requests"] == (times >= 1_651_939_200_000).sum() > 5000
    assert 0.45 < record["metrics"]["auc"]["is_click"] < 0.55
    assert record["metrics"]["hit_rate"]["10"] < 0.02


@pytest.mark.slow
def test_real_rows_of_the_whole_period(sample_archive: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", "pure", "--archive", sample_archive, "--md5", SAMPLE_MD5, "--data-root", tmp_path]
    record_of("preprocess", "kuairand", *arguments)
    record = record_of(*tiny(tmp_path, "--from", "2022-04-25"))
    assert record["num_requests"] == 168_527
