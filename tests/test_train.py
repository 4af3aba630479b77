"""`hstu train`: it learns, it is the same every time, and its checkpoint scores alike on every road."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.cli import invoke, record_of

from hstu_cli.config import TASKS
from hstu_cli.data.dataset import PreparedDataset
from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic
from hstu_cli.model import load_checkpoint
from hstu_cli.model.layer import JaggedAttention
from hstu_cli.training.examples import ExampleSource

SMALL = {
    "num_layers": 1,
    "hidden_dim": 16,
    "num_heads": 2,
    "head_dim": 8,
    "max_history": 16,
    "max_candidates": 4,
    "position_buckets": 64,
    "scaling_seqlen": 46,
    "head_dims": [16, 8],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic users, some with more events than the window, and the configuration of a small model."""
    root = tmp_path_factory.mktemp("data")
    prepare_synthetic(root, SyntheticOptions(num_users=80, num_events=30, num_items=60))
    (root / "small.json").write_text(json.dumps(SMALL))
    return root


def command(root: Path, out: Path, *arguments: object) -> list[object]:
    defaults = ["--config", root / "small.json", "--batch-size", 16, "--epochs", 3, "--lr", 0.01]
    return ["train", "--data-root", root, "--out", out, *defaults, *arguments]


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run: its folder and its record."""
    out = tmp_path_factory.mktemp("run") / "model"
    return out, record_of(*command(root, out))


def test_it_learns_what_the_data_teaches(trained: tuple[Path, dict[str, Any]]) -> None:
    epochs = trained[1]["epochs"]
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    losses = [row["next_item_loss"] for row in epochs]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    assert epochs[-1]["auc_is_click"] > 0.53
    assert epochs[-1]["hit_rate_10"] > 0.25  # 10 of 60 items by chance: 0.17


def test_the_record_says_what_was_done(root: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    out, record = trained
    assert record["status"] == "valid"
    assert record["checkpoint"] == str(out)
    dataset = PreparedDataset(root, "synthetic")
    total = record["training"]["num_examples"] + record["validation"]["num_examples"]
    assert total == dataset.metadata["num_events"]
    assert record["training"]["until_ms"] == record["validation"]["from_ms"]
    best = max(record["epochs"], key=lambda row: row["mean_auc"])
    assert record["best_epoch"] == best["epoch"]
    tasks = record["tasks"]
    seen = [best[f"auc_{task}"] for task in tasks if best[f"auc_{task}"] is not None]
    assert best["mean_auc"] == pytest.approx(np.mean(seen))
    rows = list(csv.DictReader((out / "training" / "log.csv").open(encoding="utf-8")))
    assert [float(row["mean_auc"]) for row in rows] == [row["mean_auc"] for row in record["epochs"]]


def test_the_checkpoint_is_native_and_holds_the_training_configuration(
    root: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    out, record = trained
    fields = json.loads((out / "config.json").read_text())
    assert fields["format"] == "hstu-native"
    assert {name: fields[name] for name in SMALL} == SMALL
    model = load_checkpoint(out)
    source = ExampleSource(PreparedDataset(root, "synthetic"), model.config, until_ms=record["training"]["until_ms"])
    assert model.embeddings["video_id"].keys.tolist() == [-1, *source.video_ids()]
    assert model.embeddings["user_id"].keys.tolist() == [-1, *source.user_ids]
    weight = model.embeddings["action_weights"].weight
    torch.testing.assert_close(weight[65] + weight[0], weight[1] + weight[64])  # sums of bits


def test_the_default_rows_are_trained(root: Path, tmp_path: Path) -> None:
    rows = []
    for share in (0.0, 0.3):
        out = tmp_path / str(share)
        record_of(*command(root, out, "--epochs", 1, "--id-dropout", share))
        rows.append(load_checkpoint(out).embeddings["video_id"].weight[0])
    assert not torch.equal(*rows)


def test_two_runs_end_with_the_same_weights(root: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    record = record_of(*command(root, tmp_path / "again"))
    assert _without_time(record["epochs"]) == _without_time(trained[1]["epochs"])
    assert _same_weights(tmp_path / "again", trained[0])
    record_of(*command(root, tmp_path / "other", "--seed", 1))
    assert not _same_weights(tmp_path / "other", trained[0])


KILL = """
import os, signal, torch
torch.set_num_threads(1)
from hstu_cli.model import checkpoint
from hstu_cli.training import run
from hstu_cli.training.folder import RunFolder
from hstu_cli.training.trainer import Trainer
run.SAVE_INTERVAL_S, run.MOST_WRITING = 0.0, 1e9  # the state is saved after every step
calls = 0
def killing(function, when):
    def call(*arguments, **options):
        global calls
        calls += 1
        if when == "before" and calls == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if when == "after" and calls == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
{owner}.{name} = killing({owner}.{name}, "{when}")
from hstu_cli.cli import app
app()
"""
KILLS = (
    ("Trainer", "_step", "before", 3),  # within the first epoch
    ("checkpoint", "save_file", "after", 1),  # the first checkpoint is half written
    ("RunFolder", "write_best", "after", 1),
    ("RunFolder", "write_log", "after", 1),  # the first epoch is in the log, not yet in the state
    ("Trainer", "_step", "after", 2),  # within the second
    ("torch", "save", "after", 3),  # a state is written, and not yet in its place
    ("RunFolder", "write_log", "before", 1),
)
"""Where runs are killed, one after another: owner, function, before or after it, at which call."""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    root: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    arguments = [str(argument) for argument in command(root, out, "--resume")]
    steps = []
    for owner, name, when, call in KILLS:
        code = KILL.format(owner=owner, name=name, when=when, call=call)
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        steps.append(_step_of(out))
    assert steps == sorted(steps)
    epoch = trained[1]["epochs"][0]["step"]
    assert 0 < steps[0] < epoch  # the state of a step within the first epoch
    assert epoch < steps[-2] < 2 * epoch
    record = record_of(*command(root, out, "--resume"))
    assert record["resumed_at_step"] == steps[-1]
    assert _without_time(record["epochs"]) == _without_time(trained[1]["epochs"])
    assert _same_weights(out, trained[0])
    assert sorted(path.name for path in out.rglob("*")) == sorted(path.name for path in trained[0].rglob("*"))


TERMINATIONS = (
    ("Trainer", "_step", "after", 2),  # within the first epoch
    ("torch", "save", "after", 2),  # a state is written, and not yet in its place
    ("checkpoint", "save_file", "after", 1),  # the weights of the first checkpoint are
)


def test_sigterm_is_an_interruption_and_the_run_goes_on_later(
    root: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "terminated"
    arguments = [str(argument) for argument in command(root, out, "--resume", "--format", "json")]
    for owner, name, when, call in TERMINATIONS:
        code = KILL.replace("SIGKILL", "SIGTERM").format(owner=owner, name=name, when=when, call=call)
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 143, done.stderr
        assert done.stderr.endswith("Terminated.\n")
        assert "Traceback" not in done.stderr
        record = json.loads(done.stdout)
        assert (record["status"], record["reasons"]) == ("invalid", ["interrupted"])
    assert record["resumed_at_step"] == 2
    record = record_of(*command(root, out, "--resume"))
    assert _without_time(record["epochs"]) == _without_time(trained[1]["epochs"])
    assert _same_weights(out, trained[0])
    assert sorted(path.name for path in out.rglob("*")) == sorted(path.name for path in trained[0].rglob("*"))


@pytest.mark.parametrize("recompute", ["layernorm", "layernorm+silu"])
def test_what_the_backward_pass_computes_again_changes_no_weight(
    root: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path, recompute: str
) -> None:
    """Dropout, whose masks are always made again, included."""
    record_of(*command(root, tmp_path / "m", "--recompute", recompute))
    assert _same_weights(tmp_path / "m", trained[0])


def test_resume_of_a_finished_run_does_nothing(root: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    before = (trained[0] / "model.safetensors").stat().st_mtime_ns
    record = record_of(*command(root, trained[0], "--resume"))
    assert _without_time(record["epochs"]) == _without_time(trained[1]["epochs"])
    assert (trained[0] / "model.safetensors").stat().st_mtime_ns == before


def test_scores_are_the_same_on_every_road(root: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Training's, `infer`'s with and without a cache, and those of requests alone."""
    out, record = trained
    model, dataset = load_checkpoint(out), PreparedDataset(root, "synthetic")
    from_ms = record["validation"]["from_ms"]
    logits = {}
    roads = {
        "cached": ["--batch-size", 8],
        "uncached": ["--batch-size", 8, "--no-kv-cache"],
        "alone": ["--batch-size", 1],
        "small pool": ["--batch-size", 4, "--num-pages", 20, "--page-size", 4, "--host-cache-gb", 0.001],
    }
    for name, arguments in roads.items():
        path = tmp_path / f"{name}.parquet"
        date = np.datetime64(from_ms, "ms").item().isoformat() + "+00:00"
        record_of(
            "infer", "--checkpoint", out, "--data-root", root, "--from", date, "--predictions-out", path, *arguments
        )
        table = pq.read_table(path)
        logits[name] = np.stack([table[f"logit_{task}"].to_numpy() for task in TASKS], 1)
    for name in roads:
        np.testing.assert_allclose(logits[name], logits["alone"], rtol=1e-4, atol=1e-5)
    # In one pass over a user, the first candidate of each request has the same history.
    timeline = dataset.requests(from_ms=from_ms)
    starts = np.cumsum(timeline.num_candidates) - timeline.num_candidates
    source = ExampleSource(dataset, model.config, from_ms=from_ms)
    scored = {}
    for passes in source.batches_of_tokens(500):
        batch = source.batch(passes)
        attention = JaggedAttention(model.config, batch.tokens.plan())
        with torch.no_grad():
            rows = model.rank(model(batch.tokens, attention)[batch.item_rows])
        keys = [(source.user_ids[one.user], event) for one in passes for event in range(one.scored_from, one.end)]
        scored |= dict(zip(keys, rows.numpy(), strict=True))
    own = [scored[key] for key in zip(timeline.user_id.tolist(), timeline.history_end.tolist(), strict=True)]
    np.testing.assert_allclose(np.stack(own), logits["alone"][starts], rtol=1e-4, atol=1e-5)


def test_bf16_trains_float32_weights(root: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    record = record_of(*command(root, tmp_path / "bf16", "--dtype", "bf16"))
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert weights["layers.0.uvqk.weight"].dtype == torch.float32
    ours, theirs = record["epochs"][-1], trained[1]["epochs"][-1]
    assert ours["next_item_loss"] == pytest.approx(theirs["next_item_loss"], rel=0.02)


def test_sampled_negatives_train(root: Path, tmp_path: Path) -> None:
    record = record_of(*command(root, tmp_path / "sampled", "--num-negatives", 20))
    losses = [row["next_item_loss"] for row in record["epochs"]]
    assert losses == sorted(losses, reverse=True)


def test_the_table_shows_every_epoch(root: Path, tmp_path: Path) -> None:
    result = invoke(*command(root, tmp_path / "m", "--epochs", 2))
    assert result.exit_code == 0, result.stderr
    assert "epoch 2: ranking loss" in result.stdout
    assert "Best epoch" in result.stdout


def _without_time(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "elapsed_s"} for row in epochs]


def _same_weights(a: Path, b: Path) -> bool:
    states = [load_file(folder / "model.safetensors") for folder in (a, b)]
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def _step_of(out: Path) -> int:
    """Steps of the saved state, 0 before there is one."""
    path = out / "training" / "state.pt"
    return torch.load(path, weights_only=True)["trainer"]["step"] if path.exists() else 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_on_a_gpu(root: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "gpu"
    record = record_of(*command(root, out, "--device", "cuda", "--dtype", dtype))
    ours, theirs = record["epochs"][-1], trained[1]["epochs"][-1]
    assert ours["next_item_loss"] == pytest.approx(theirs["next_item_loss"], rel=0.02)
    again = record_of(*command(root, out, "--device", "cuda", "--dtype", dtype, "--resume"))
    assert _without_time(again["epochs"]) == _without_time(record["epochs"])
