"""Launch settings of Triton kernels: what is measured and when, what is kept on disk, and what is passed over."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hstu_cli.backend import Backend
from hstu_cli.errors import UnavailableError
from hstu_cli.kernels import tuning
from hstu_cli.kernels.triton.tuning import LaunchConfig, TritonTuner, bucket, choose_config, pinned_configs

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.errors import OutOfResources, PTXASError

SLOW, FAST, OTHER = (LaunchConfig.of(num_warps=warps, BLOCK_M=16) for warps in (1, 2, 4))
VERSIONS = {"triton": "3.7.1", "torch": "2.13.0"}


class Sleeper:
    """Something to launch: takes a millisecond, or with FAST less, and counts."""

    def __init__(self, failures: dict[LaunchConfig, Exception] | None = None) -> None:
        self.failures = failures or {}
        self.launches: list[LaunchConfig] = []

    def __call__(self, config: LaunchConfig) -> None:
        self.launches.append(config)
        if config in self.failures:
            raise self.failures[config]
        if config != FAST:
            time.sleep(1e-3)


@pytest.fixture
def choose(tmp_path: Path) -> Callable[..., LaunchConfig]:
    """Asks a tuner of its own, as a new process would, on the folder of this test."""

    def ask(run: Sleeper, *, key: tuple = ("bf16", 64), folder: Path = tmp_path, **changes: object) -> LaunchConfig:
        about = {"kernel": "sleep", "configs": (SLOW, FAST, OTHER), "source": __file__, **changes}
        tuner = TritonTuner(about.pop("backend", Backend()), folder, about.pop("versions", VERSIONS))
        return tuner.choose(key=key, run=run, **about)

    return ask


def stored(folder: Path) -> Path:
    """The only file of a folder."""
    (path,) = folder.iterdir()
    return path


def test_the_fastest_is_chosen_and_every_one_measured_in_turn(choose: Callable, tmp_path: Path) -> None:
    run = Sleeper()
    assert choose(run) == FAST
    assert run.launches == [SLOW, FAST, OTHER] * (tuning.ROUNDS + 1)
    content = json.loads(stored(tmp_path).read_text())
    assert content["config"] == {"BLOCK_M": 16, "num_warps": 2, "num_stages": 1, "variant": ""}
    medians = content["median_ms"]
    assert set(medians) == {"M=16 warps=1 stages=1", "M=16 warps=2 stages=1", "M=16 warps=4 stages=1"}
    assert medians.pop(FAST.label) < 1 <= min(medians.values())


def test_one_tuner_measures_a_key_once(tmp_path: Path) -> None:
    tuner, run = TritonTuner(Backend(), tmp_path, VERSIONS), Sleeper()
    for key in (("bf16", 64), ("bf16", 64), ("bf16", 128)):
        assert tuner.choose("sleep", key, (SLOW, FAST), run, __file__) == FAST
    assert len(run.launches) == 2 * 2 * (tuning.ROUNDS + 1)


def test_another_process_reads_what_was_measured(choose: Callable) -> None:
    choose(Sleeper())
    run = Sleeper()
    assert choose(run) == FAST
    assert run.launches == []


class OtherDevice(Backend):
    """A CPU by another name."""

    device_name = "another device"


@pytest.mark.parametrize(
    "changed",
    [
        {"kernel": "other"},
        {"key": ("bf16", 128)},
        {"source": tuning.__file__},
        {"versions": {**VERSIONS, "triton": "3.6.0"}},
        {"backend": OtherDevice()},
        {"configs": (SLOW, OTHER)},
    ],
    ids=["kernel", "key", "source", "version", "device", "configurations"],
)
def test_a_choice_holds_for_what_it_was_measured_on(choose: Callable, changed: dict[str, object]) -> None:
    choose(Sleeper())
    run = Sleeper()
    choose(run, **changed)
    assert run.launches


@pytest.mark.parametrize(
    "content",
    [b"", b'{"about": ', b"\xff\xfe", b"[]", b"{}", b'{"about": {"kernel": "other"}, "config": {"num_warps": 2}}'],
    ids=["empty", "cut short", "no text", "no object", "nothing in it", "about something else"],
)
def test_a_damaged_file_is_written_anew(choose: Callable, tmp_path: Path, content: bytes) -> None:
    choose(Sleeper())
    path = stored(tmp_path)
    path.write_bytes(content)
    run = Sleeper()
    assert choose(run) == FAST
    assert run.launches
    assert json.loads(stored(tmp_path).read_text())["config"]["num_warps"] == 2


def test_a_configuration_that_is_no_choice_any_more_is_not_taken(choose: Callable, tmp_path: Path) -> None:
    choose(Sleeper())
    content = json.loads(stored(tmp_path).read_text())
    content["config"]["BLOCK_M"] = 1 << 20
    stored(tmp_path).write_text(json.dumps(content))
    assert choose(Sleeper()) == FAST


@pytest.fixture
def no_folder(tmp_path: Path) -> Iterator[Path]:
    """A place where no folder can be made, for root neither."""
    (tmp_path / "file").write_text("")
    yield tmp_path / "file" / "tuning"
    assert os.listdir(tmp_path) == ["file"]


def test_without_a_folder_each_process_measures(choose: Callable, no_folder: Path) -> None:
    for _ in range(2):
        run = Sleeper()
        assert choose(run, folder=no_folder) == FAST
        assert run.launches


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        PTXASError("ptxas ran out of registers"),
        RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_device_has_no_resources_for_is_passed_over(choose: Callable, error: Exception) -> None:
    run = Sleeper({FAST: error})
    assert choose(run) in (SLOW, OTHER)
    assert run.launches.count(FAST) == 1


def test_no_configuration_fits(choose: Callable, tmp_path: Path) -> None:
    failures = dict.fromkeys((SLOW, FAST, OTHER), OutOfResources(300_000, 232_448, "shared memory"))
    with pytest.raises(UnavailableError, match=r"sleep; choose --impl blocked.*M=16 warps=4.*300000"):
        choose(Sleeper(failures))
    assert list(tmp_path.iterdir()) == []


NOT_OF_THE_CHIP = (
    RuntimeError("an illegal memory access"),
    TypeError("a bug"),
    torch.OutOfMemoryError("CUDA out of memory"),
)


@pytest.mark.parametrize("error", NOT_OF_THE_CHIP, ids=str)
def test_other_failures_are_not_hidden(choose: Callable, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        choose(Sleeper({FAST: error}))


def test_a_file_is_measured_anew_after_a_change_to_any_of_its_sources(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("kernel.py", "plan.py")]
    for path in files:
        path.write_text("before")
    names = [str(path) for path in files]
    tuner = tuning.Tuner(Backend(), tmp_path / "tuning", VERSIONS)
    for changed in (None, *files):
        if changed is not None:
            changed.write_text("after")
            tuning._hash_of_files.cache_clear()
        tuning.Tuner(Backend(), tmp_path / "tuning", VERSIONS).choose("sleep", (), (SLOW, FAST), Sleeper(), *names)
    assert len(list((tmp_path / "tuning").iterdir())) == 3
    run = Sleeper()
    assert tuner.choose("sleep", (), (SLOW, FAST), run, *names) == FAST
    assert run.launches == []


class Capturing(Backend):
    """Work is being captured into a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.capturing = True

    def is_capturing(self) -> bool:
        return self.capturing


def test_nothing_is_measured_while_a_graph_is_captured(choose: Callable, tmp_path: Path) -> None:
    backend, run = Capturing(), Sleeper()
    tuner = TritonTuner(backend, tmp_path, VERSIONS)
    ask = ("sleep", ("bf16", 64), (SLOW, FAST), run, __file__)
    assert tuner.choose(*ask) == SLOW
    assert run.launches == []
    backend.capturing = False
    assert tuner.choose(*ask) == FAST  # the guess was not kept
    backend.capturing = True
    assert tuner.choose(*ask) == FAST
    assert TritonTuner(backend, tmp_path, VERSIONS).choose(*ask) == FAST  # from disk


def test_pinned_configurations_are_taken_and_let_go(tmp_path: Path) -> None:
    def ask(kernel: str) -> LaunchConfig:
        return choose_config(kernel, (), (SLOW,), Sleeper(), device=torch.device("cpu"), source=__file__)

    with pinned_configs({"a": FAST}):
        assert (ask("a"), ask("b")) == (FAST, SLOW)
        with pinned_configs({"a": OTHER, "b": FAST}):
            assert (ask("a"), ask("b")) == (OTHER, FAST)
        assert (ask("a"), ask("b")) == (FAST, SLOW)
        with pytest.raises(KeyError), pinned_configs({"b": FAST}):
            raise KeyError
        assert ask("b") == SLOW
    assert ask("a") == SLOW


PROCESS = """
import sys, time, torch
from hstu_cli.kernels.triton.tuning import LaunchConfig, choose_config
configs = [LaunchConfig.of(num_warps=warps) for warps in (1, 2, 4)]
launches = []
def run(config):
    launches.append(config)
    time.sleep(1e-4 if config.num_warps == 2 else 1e-3)
for size in range(20):
    chosen = choose_config("sleep", (size,), configs, run, device=torch.device("cpu"), source=sys.argv[1])
    assert chosen.num_warps == (1 if sys.argv[2] == "interpreted" else 2), chosen
print(len(launches))
"""


def start(folder: Path, mode: str = "compiled") -> subprocess.Popen:
    """A process that chooses for twenty keys, with its cache in a folder; prints how often it launched."""
    environment = {**os.environ, "HSTU_KERNEL_CACHE": str(folder)}
    environment["TRITON_INTERPRET"] = "1" if mode == "interpreted" else "0"
    command = [sys.executable, "-c", PROCESS, __file__, mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_processes_at_once_share_a_folder(tmp_path: Path) -> None:
    at_once = [start(tmp_path) for _ in range(2)]
    for process in at_once:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    files = list((tmp_path / "tuning").iterdir())
    assert len(files) == 20
    assert all(json.loads(path.read_text())["config"]["num_warps"] == 2 for path in files)
    output, errors = start(tmp_path).communicate(timeout=120)
    assert output.strip() == "0", errors


def test_the_interpreter_takes_the_first(tmp_path: Path) -> None:
    output, errors = start(tmp_path, "interpreted").communicate(timeout=120)
    assert output.strip() == "0", errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (128, 128), (129, 256)])
def test_sizes_share_buckets(size: int, expected: int) -> None:
    assert bucket(size) == expected
