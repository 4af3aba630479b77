"""`hstu infer` with wrong input: one clear message, the right exit code, nothing left behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from support.cli import failure_of, invoke, record_of

from hstu_cli.backend import Backend
from hstu_cli.bench.setup import random_model_for
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.data.dataset import PreparedDataset
from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic
from hstu_cli.model import save_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare_synthetic(root, SyntheticOptions(num_users=20, num_events=20, num_items=40))
    return root


def tiny(root: Path, *arguments: object) -> list[object]:
    return ["infer", "--config", "tiny", "--data-root", root, *arguments]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 0], "--steps"),
        (["--batch-size", 0], "--batch-size"),
        (["--top-k", 0], "--top-k"),
        (["--top-k", 41], "vocabulary"),
        (["--config", "huge"], "kuairand_gr, tiny, benchmark"),
        (["--device", "tpu"], "auto, cpu, cuda[:N], npu[:N], l20"),
        (["--device", "cpu:1"], "cpu:1"),
        (["--device", "cuda:x"], "cuda:x"),
        (["--dtype", "fp8"], "fp32, bf16, fp16"),
        (["--impl", "magic"], "reference, blocked"),
        (["--dataset", "movielens"], "kuairand-pure"),
        (["--from", "yesterday"], "2022-04-25"),
        (["--from", "2022-05-01", "--until", "2022-04-01"], "before"),
        (["--metadata", "novalue"], "KEY=VALUE"),
        (["--format", "xml"], "--format"),
        (["--nonsense"], "--nonsense"),
        (["--config", ""], "kuairand_gr, tiny, benchmark"),
        (["--seed", 2**63], "--seed"),
        (["--host-cache-gb", "inf"], "--host-cache-gb"),
        (["--host-cache-gb", "nan"], "--host-cache-gb"),
        (["--predictions-out", "same", "--output-json", "same"], "same file"),
        (["--no-kv-cache", "--append-impl", "torch"], "need the cache: drop --no-kv-cache"),
    ],
)
def test_wrong_command_lines_exit_2(root: Path, arguments: list[object], message: str) -> None:
    assert message in failure_of(2, *tiny(root, *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "CUDA"),
        (["--device", "npu"], "torch_npu"),
        (["--device", "h200", "--require-device"], "H200"),
    ],
)
def test_absent_devices_exit_3_before_data_is_read(tmp_path: Path, arguments: list[object], message: str) -> None:
    if torch.cuda.is_available() and "npu" not in arguments:
        pytest.skip("this machine has a GPU")
    assert message in failure_of(3, *tiny(tmp_path / "missing", *arguments))


def test_hardware_preset_runs_here_and_says_so(root: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = invoke(*tiny(root, "--steps", 1, "--device", "l20", "--format", "json"))
    device = json.loads(result.stdout)["device"]
    assert device["requested"] == "l20"
    assert device["actual"] == "cpu"
    assert "L20" not in device["name"]
    assert "no L20" in result.stderr


def test_missing_data_root_exits_4(tmp_path: Path) -> None:
    assert "hstu preprocess kuairand" in failure_of(4, *tiny(tmp_path / "missing"))


def test_missing_named_set_exits_4_with_the_command(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "hstu preprocess kuairand --dataset kuairand-1k" in failure_of(4, *tiny(root, "--dataset", "1k"))
    monkeypatch.setenv("HSTU_HOME", str(tmp_path))
    assert "--dataset kuairand-1k" in failure_of(4, "infer", "--dataset", "1k")


def test_period_without_requests_exits_4(root: Path) -> None:
    assert "2022" in failure_of(4, *tiny(root, "--from", "2023-01-01"))


@pytest.fixture
def own_root(tmp_path: Path) -> Path:
    """A prepared set that a test may damage."""
    prepare_synthetic(tmp_path / "own", SyntheticOptions(num_users=3, num_events=10))
    return tmp_path / "own"


def test_another_schema_version_exits_4(own_root: Path) -> None:
    path = own_root / "synthetic" / "metadata.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    for named in ([], ["--dataset", "synthetic"]):
        message = failure_of(4, *tiny(own_root, *named))
        assert "99" in message
        assert "hstu preprocess kuairand --synthetic" in message


@pytest.mark.parametrize("name", ["sequences.parquet", "users.parquet", "requests.parquet", "metadata.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
def test_damaged_sets_exit_4(own_root: Path, name: str, damage: str) -> None:
    path = own_root / "synthetic" / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text("no such thing")
    assert "hstu preprocess kuairand" in failure_of(4, *tiny(own_root, "--dataset", "synthetic"))


def test_a_set_whose_parts_do_not_fit_exits_4(own_root: Path) -> None:
    folder = own_root / "synthetic"
    for name in ("sequences.parquet", "users.parquet"):
        whole = (folder / name).read_bytes()
        table = pq.read_table(folder / name)
        pq.write_table(table.slice(0, table.num_rows - 1), folder / name)
        assert "synthetic" in failure_of(4, *tiny(own_root))
        (folder / name).write_bytes(whole)
    (folder / "metadata.json").write_text('{"schema_version": 1}')
    assert "category_maps" in failure_of(4, *tiny(own_root))


@pytest.mark.parametrize("option", ["--output-json", "--predictions-out"])
def test_folders_as_outputs_exit_4_before_the_run(root: Path, tmp_path: Path, option: str) -> None:
    assert option in failure_of(4, *tiny(root, option, tmp_path))


@pytest.mark.parametrize("option", ["--output-json", "--predictions-out"])
def test_unwritable_outputs_exit_4_before_the_run(root: Path, tmp_path: Path, option: str) -> None:
    assert option in failure_of(4, *tiny(root, option, tmp_path / "missing" / "file"))


def test_bad_checkpoints_exit_4(root: Path, tmp_path: Path) -> None:
    model = random_model_for(PreparedDataset(root, "synthetic"), MODEL_PRESETS["tiny"], Backend(), seed=0)
    state = model.state_dict()
    del state["head.0.weight"]
    state["head.2.bias"][0] = float("nan")
    torch.save(state, tmp_path / "model.pt")
    message = failure_of(4, *tiny(root, "--checkpoint", tmp_path / "model.pt"))
    assert "head.0.weight is missing" in message
    assert "head.2.bias is not finite" in message
    (tmp_path / "text.safetensors").write_text("hello")
    assert "text.safetensors" in failure_of(4, *tiny(root, "--checkpoint", tmp_path / "text.safetensors"))
    assert "nowhere" in failure_of(4, *tiny(root, "--checkpoint", tmp_path / "nowhere.pt"))


def test_a_config_that_disagrees_with_the_checkpoint_exits_2(root: Path, tmp_path: Path) -> None:
    model = random_model_for(PreparedDataset(root, "synthetic"), MODEL_PRESETS["tiny"], Backend(), seed=0)
    save_checkpoint(model, tmp_path / "model")
    arguments = ["infer", "--data-root", root, "--checkpoint", tmp_path / "model", "--steps", 1]
    assert "num_layers" in failure_of(2, *arguments, "--config", "kuairand_gr")
    assert record_of(*arguments)["model"]["num_layers"] == 2


def test_ids_beyond_a_table_without_keys_exit_1_or_4_with_the_table(root: Path, tmp_path: Path) -> None:
    dataset = PreparedDataset(root, "synthetic")
    model = random_model_for(dataset, MODEL_PRESETS["tiny"], Backend(), seed=0)
    state = model.state_dict()
    state["embeddings.user_active_degree.weight"] = state["embeddings.user_active_degree.weight"][:2]
    torch.save(state, tmp_path / "model.pt")
    assert "user_active_degree" in failure_of(4, *tiny(root, "--checkpoint", tmp_path / "model.pt"))


def test_random_tables_beyond_memory_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu_cli.backend.base.physical_memory_bytes", lambda: 10_000)
    assert "GB" in failure_of(1, *tiny(root))


def test_verbose_shows_where_an_error_came_from(root: Path) -> None:
    result = invoke(*tiny(root, "--dataset", "1k", "--verbose"))
    assert result.exit_code == 4
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_an_interruption_reports_what_is_finished_and_leaves_no_half_file(
    number: int, exit_code: int, tmp_path: Path
) -> None:
    prepare_synthetic(tmp_path, SyntheticOptions(num_users=50, num_events=400))
    arguments = tiny(tmp_path, "--batch-size", 2, "--dump-logits", "--format", "json")
    arguments += ["--predictions-out", tmp_path / "p.parquet", "--output-json", tmp_path / "record.json"]
    with subprocess.Popen(
        [sys.executable, "-m", "hstu_cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for line in process.stderr:
            if line.startswith("batch 3:"):
                process.send_signal(number)
                break
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert "Traceback" not in stderr
    record = json.loads(stdout)
    assert (record["status"], record["reasons"]) == ("invalid", ["interrupted"])
    assert record["num_batches"] >= 4
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert not list(tmp_path.glob("*p.parquet*"))
    assert not list(tmp_path.glob(".p.parquet*"))
