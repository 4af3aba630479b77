"""`--cuda-graph` and `--append-impl`: what the record says, and what is refused."""

from pathlib import Path

import pytest
from support.cli import failure_of, invoke, record_of

from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare_synthetic(root, SyntheticOptions(num_users=12, num_events=60, num_items=100))
    return root


def infer(root: Path, *arguments: object) -> list[object]:
    return [
        "infer",
        "--config",
        "tiny",
        "--data-root",
        root,
        "--steps",
        3,
        "--batch-size",
        4,
        "--device",
        "cpu",
        *arguments,
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "auto: a CPU has no graphs to replay"),
        (["--no-cuda-graph"], "as requested"),
        (["--no-kv-cache"], "auto: a CPU has no graphs to replay"),
    ],
    ids=str,
)
def test_the_record_says_why_there_are_no_graphs(root: Path, options: list[str], reason: str) -> None:
    assert record_of(*infer(root, *options))["cuda_graph"] == {"enabled": False, "reason": reason}


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        (3, ["--cuda-graph"], "--cuda-graph: a CPU has no graphs to replay"),
        (2, ["--cuda-graph", "--no-kv-cache"], "drop --no-kv-cache"),
        (2, ["--append-impl", "fast"], "choose from auto, triton, flashinfer, torch"),
        (3, ["--append-impl", "flashinfer"], "FlashInfer runs on NVIDIA GPUs alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_message(root: Path, code: int, options: list[str], message: str) -> None:
    assert message in failure_of(code, *infer(root, *options))


def test_tables_show_both(root: Path) -> None:
    shown = " ".join(invoke(*infer(root)).stdout.split())
    assert "CUDA graphs" in shown
    assert "off (auto: a CPU has no graphs to replay)" in shown
    assert "torch (auto: the one for cpu)" in shown
    assert record_of(*infer(root, "--append-impl", "torch"))["kv_cache"]["append_reason"] == "as requested"


@pytest.mark.parametrize("command", ["bench-layer", "bench-e2e"])
def test_benchmarks_take_it_too(command: str) -> None:
    shape = {
        "bench-layer": ["--history", "8", "--cached", "4", "--candidates", "0", "--batch-size", "1"],
        "bench-e2e": ["--history-step", "4", "--num-batches", "2", "--candidates", "3", "--num-users", "1"],
    }[command]
    arguments = [command, "--config", "tiny", *shape, "--num-iters", "1", "--device", "cpu"]
    assert record_of(*arguments)["append"] == {"name": "torch", "reason": "auto: the one for cpu"}
    assert "NVIDIA" in failure_of(3, *arguments, "--append-impl", "flashinfer")
