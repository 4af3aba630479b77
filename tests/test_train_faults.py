"""`hstu train` with wrong input, data that teaches nothing, and a run that goes wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from support.cli import failure_of, invoke, record_of
from test_train import SMALL

from hstu_cli.commands.options import parse_date
from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic
from hstu_cli.kernels.dispatch import choose_impl
from hstu_cli.model import load_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare_synthetic(root, SyntheticOptions(num_users=20, num_events=15, num_items=40))
    (root / "small.json").write_text(json.dumps(SMALL))
    return root


def command(root: Path, out: Path, *arguments: object) -> list[object]:
    return ["train", "--data-root", root, "--out", out, "--config", root / "small.json", "--epochs", 1, *arguments]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", 0], "--epochs"),
        (["--batch-size", 0], "--batch-size"),
        (["--lr", 0], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--dropout", 1], "--dropout"),
        (["--id-dropout", "-0.1"], "--id-dropout"),
        (["--weight-decay", "-0.1"], "--weight-decay"),
        (["--next-item-weight", "nan"], "--next-item-weight"),
        (["--num-negatives", 0], "--num-negatives"),
        (["--dtype", "fp16"], "bf16 or fp32"),
        (["--impl", "ascend"], "runs on an NPU"),
        (["--recompute", "everything"], "--recompute takes none, layernorm, silu, layernorm+silu"),
        (["--recompute", "silu", "--impl", "reference"], "'reference' keeps everything"),
        (["--until", "2022-05-01", "--from", "2022-04-25"], "trained and validated on"),
        (["--until", "soon"], "2022-04-25"),
        (["--config", "huge"], "kuairand_gr, tiny, benchmark"),
    ],
)
def test_wrong_command_lines_exit_2_and_leave_nothing(
    root: Path, tmp_path: Path, arguments: list[object], message: str
) -> None:
    assert message in failure_of(2, *command(root, tmp_path / "m", *arguments))
    assert not (tmp_path / "m").exists()


def test_without_a_folder_it_says_so(root: Path) -> None:
    assert "--out" in failure_of(2, "train", "--data-root", root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--until", "2022-04-01"], "before the end of training"),
        (["--from", "2022-06-01"], "earlier --from"),
        (["--dataset", "27k"], "hstu preprocess kuairand"),
    ],
)
def test_periods_without_events_exit_4(root: Path, tmp_path: Path, arguments: list[object], message: str) -> None:
    assert message in failure_of(4, *command(root, tmp_path / "m", *arguments))
    assert not (tmp_path / "m").exists()


def changed(
    root: Path,
    target: Path,
    *,
    labels: int | None = None,
    users: int | None = None,
    labels_from: tuple[str, int] | None = None,
) -> Path:
    """A copy of the prepared data with one label for all events or those from a date on, or with the first users."""
    folder = target / "synthetic"
    folder.mkdir(parents=True)
    for file in (root / "synthetic").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    sequences = pq.read_table(folder / "sequences.parquet")
    if labels is not None:
        lists = sequences["action_weights"].combine_chunks()
        same = pa.array([labels] * len(lists.values), pa.int16())
        column = sequences.schema.get_field_index("action_weights")
        sequences = sequences.set_column(
            column, sequences.schema.field(column), pa.ListArray.from_arrays(lists.offsets, same)
        )
    if labels_from is not None:
        date, label = labels_from
        lists, times = (sequences[name].combine_chunks() for name in ("action_weights", "time_ms"))
        late = times.values.to_numpy() >= parse_date("--from", date)
        some = pa.array(np.where(late, label, lists.values.to_numpy()), pa.int16())
        column = sequences.schema.get_field_index("action_weights")
        sequences = sequences.set_column(
            column, sequences.schema.field(column), pa.ListArray.from_arrays(lists.offsets, some)
        )
    if users is not None:
        sequences = sequences.slice(0, users)
        requests = pq.read_table(folder / "requests.parquet")
        kept = pa.compute.is_in(requests["user_id"], sequences["user_id"].combine_chunks())
        pq.write_table(requests.filter(kept), folder / "requests.parquet")
    pq.write_table(sequences, folder / "sequences.parquet")
    return target


def test_data_without_a_usable_task_exits_4(root: Path, tmp_path: Path) -> None:
    same = changed(root, tmp_path / "same", labels=1)
    arguments = command(root, tmp_path / "m")
    arguments[2] = same
    assert "no task with both classes" in failure_of(4, *arguments)


def test_a_single_user_exits_4(root: Path, tmp_path: Path) -> None:
    alone = changed(root, tmp_path / "alone", users=1)
    arguments = command(root, tmp_path / "m")
    arguments[2] = alone
    assert "a single user" in failure_of(4, *arguments)


def test_a_task_with_one_class_is_left_out_with_a_warning(root: Path, tmp_path: Path) -> None:
    result = invoke(*command(root, tmp_path / "m"))
    assert result.exit_code == 0
    record = json.loads(result.stdout[result.stdout.index("\n{") :])
    assert record["tasks_left_out"]
    for task, reason in record["tasks_left_out"].items():
        assert f"{task} is left out of the loss: {reason}" in " ".join(result.stderr.split())
        assert task not in record["tasks"]


def test_a_diverging_loss_keeps_the_last_good_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m"
    record_of(*command(root, tmp_path / "good", "--seed", 3))
    from hstu_cli.training.trainer import Trainer

    rate = Trainer.learning_rate
    monkeypatch.setattr(Trainer, "learning_rate", lambda self: rate(self) if self.epoch == 0 else 1e12)
    result = invoke(*command(root, out, "--seed", 3, "--epochs", 4))
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    message = " ".join(result.stderr.split())
    assert "The loss diverged" in message
    assert "keeps epoch 1" in message
    record = json.loads(result.stdout[result.stdout.index("\n{") :])
    assert record["status"] == "invalid"
    assert record["best_epoch"] == 1
    kept = load_file(out / "model.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in kept.values())


@pytest.mark.parametrize("batch_size", [1, 1000], ids=["many steps", "a step an epoch"])
def test_a_run_that_diverges_at_once_leaves_no_checkpoint(root: Path, tmp_path: Path, batch_size: int) -> None:
    result = invoke(*command(root, tmp_path / "m", "--lr", 1e30, "--epochs", 2, "--batch-size", batch_size))
    assert result.exit_code == 1
    message = " ".join(result.stderr.split())
    assert "The loss diverged" in message
    assert "There is no checkpoint yet" in message
    assert not (tmp_path / "m" / "config.json").exists()


def test_a_folder_with_a_run_is_not_written_over(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    record_of(*command(root, out))
    weights = (out / "model.safetensors").read_bytes()
    assert "--resume" in failure_of(2, *command(root, out))
    assert "lr 0.002, not 0.1" in failure_of(2, *command(root, out, "--resume", "--lr", 0.1))
    own = choose_impl("auto", "cpu", gradients=True).name
    assert f"impl {own}, not reference" in failure_of(2, *command(root, out, "--resume", "--impl", "reference"))
    assert "from 2022-" in failure_of(2, *command(root, out, "--resume", "--from", "2022-05-07"))
    assert (out / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["anew", "resume"])
@pytest.mark.parametrize("left", ["config.json", "notes.txt"])
def test_a_folder_with_something_else_is_not_written_over(
    root: Path, tmp_path: Path, left: str, resume: list[str]
) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / left).write_text("kept")
    assert "holds something else" in failure_of(4, *command(root, out, *resume))
    assert [path.name for path in out.iterdir()] == [left]


def test_a_checkpoint_whose_state_is_gone_is_not_written_over(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    record_of(*command(root, out))
    (out / "training" / "state.pt").unlink()
    assert "no state to go on from" in failure_of(4, *command(root, out, "--resume"))


def test_a_validation_period_without_both_classes_exits_4(root: Path, tmp_path: Path) -> None:
    half = changed(root, tmp_path / "half", labels_from=("2022-05-01", 0))
    arguments = command(root, tmp_path / "m", "--from", "2022-05-01")
    arguments[2] = half
    assert "no AUC can choose" in failure_of(4, *arguments)


def test_users_without_anything_before_their_item_have_no_hit_rate(root: Path, tmp_path: Path) -> None:
    """No context and no history: nothing predicts the item, and the run goes on without a hit rate."""
    prepare_synthetic(tmp_path, SyntheticOptions(num_users=400, num_events=1, num_items=5))
    (tmp_path / "small.json").write_text(json.dumps({**SMALL, "contextual_features": []}))
    result = invoke(*command(tmp_path, tmp_path / "m", "--from", "2022-05-04"))
    assert result.exit_code == 0, result.stderr
    assert "hit rate 50" in result.stdout


def test_memory_that_does_not_suffice_is_one_message(root: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.json").write_text(json.dumps({**SMALL, "num_heads": 32, "head_dim": 2048, "hidden_dim": 512}))
    arguments = [str(argument) for argument in command(root, tmp_path / "m", "--config", tmp_path / "wide.json")]
    code = (
        "import resource, torch\n"
        "torch.set_num_threads(1)\n"
        "from hstu_cli.cli import app\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "app()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "Out of memory" in done.stderr


def test_a_damaged_state_exits_4(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    record_of(*command(root, out))
    state = out / "training" / "state.pt"
    settings = torch.load(state, weights_only=True)["settings"]
    state.write_bytes(state.read_bytes()[:1000])
    assert "state.pt" in failure_of(4, *command(root, out, "--resume"))
    state.write_bytes(b"")
    assert "state.pt" in failure_of(4, *command(root, out, "--resume"))
    torch.save({"version": 99}, state)
    assert "no state of a training run" in failure_of(4, *command(root, out, "--resume"))
    torch.save({"version": 1, "settings": settings, "trainer": {}}, state)
    assert "does not fit this run" in failure_of(4, *command(root, out, "--resume"))


def test_two_runs_do_not_share_a_folder(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    (out / "training").mkdir(parents=True)
    with FileLock(out / "training" / ".lock"):
        assert "Another training run" in failure_of(1, *command(root, out))


def test_a_folder_that_cannot_be_made_exits_4(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be made" in failure_of(4, *command(root, tmp_path / "file"))


def test_a_state_that_cannot_be_written_ends_the_run_with_what_is_done(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    arguments = [str(argument) for argument in command(root, out)]
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"  # the checkpoint fits, the state does not
        "from hstu_cli.cli import app; app()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "training state cannot be written" in " ".join(done.stderr.split())
    assert load_checkpoint(out).config.hidden_dim == SMALL["hidden_dim"]
    assert not list(out.rglob("*.partial"))
