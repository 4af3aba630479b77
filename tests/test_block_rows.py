"""Strips of blocked attention: measured once on an accelerator, kept for the next process, decided by hand."""

import json
import platform
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import failure_of, invoke
from support.npu import record, run_on_stand_in, why_no_stand_in

from hstu_cli.backend import Backend, NpuBackend
from hstu_cli.commands.opening import strips_line
from hstu_cli.errors import UsageError
from hstu_cli.kernels.attention.block_rows import CANDIDATES, VARIABLE
from hstu_cli.kernels.attention.bucketed import SOURCES, block_rows_for

on_stand_in = pytest.mark.skipif(why_no_stand_in() is not None, reason=str(why_no_stand_in()))

SMALL = """
import json, time, torch
from typer.testing import CliRunner
from hstu_cli.backend import NpuBackend
from hstu_cli.bench.session import BenchSession
from hstu_cli.cli import app
from hstu_cli.kernels import tuning
from hstu_cli.kernels.attention import block_rows, bucketed
block_rows.MEASURED_TOKENS, tuning.ROUNDS, tuning.AHEAD_BYTES = 300, 2, 1 << 10
happened = []
def measured(self, kernel, configs, run, measure=tuning.Tuner._measure):
    def slower(config):  # all but one, by more than this machine's noise
        run(config)
        time.sleep(0.0 if config.num_rows == 256 else 0.3)
    happened.append("tuned")
    return measure(self, kernel, configs, slower)
def timed(self, group, cases, measure=BenchSession.measure):
    happened.append("timed")
    return measure(self, group, cases)
tuning.Tuner._measure, BenchSession.measure = measured, timed
def command(*arguments):
    done = CliRunner().invoke(app, [*arguments, "--device", "npu", "--format", "json"])
    return [done.exit_code, done.stdout, done.stderr]
"""

INFER = '"infer", "--config", "tiny", "--steps", "4"'
FIRST = f"{SMALL}result = [command({INFER}), happened]"
SECOND = f"""{SMALL}
e2e = command("bench-e2e", "--config", "tiny", "--num-iters", "1", "--num-iters-warmup", "0", "--num-users", "1",
              "--history-step", "60", "--num-batches", "2", "--candidates", "3")
other = command("bench-layer", "--config", "tiny", "--dtype", "fp32", "--num-iters", "1", "--num-iters-warmup", "0",
                "--history", "200", "--cached", "0", "--candidates", "0", "--batch-size", "1")
result = [command({INFER}), e2e, other, happened]
"""

NO_MEMORY = f"""{SMALL}
import os
from pathlib import Path
def attend(q, k, v, groups, pages, alpha, scaling_seqlen, block_rows, attend=bucketed._attend):
    if block_rows == 1024:
        raise {{error}}
    return attend(q, k, v, groups, pages, alpha, scaling_seqlen, block_rows)
bucketed._attend = attend
os.environ["HSTU_KERNEL_CACHE"] = str(Path.cwd() / "without memory")
result = [command({INFER}), command({INFER}), happened, Path("without memory", "tuning").exists()]
"""

IN_A_GRAPH = """
import torch
from hstu_cli.kernels import tuning
from hstu_cli.kernels.attention.bucketed import block_rows_for
tuning.Tuner._measure = lambda self, *arguments: happened.append("tuned")
happened = []
graph = torch.npu.NPUGraph()
with torch.npu.stream(torch.npu.Stream()):
    graph.capture_begin()
    chosen = block_rows_for(torch.device("npu", 0), torch.float16, 4, 128)
    graph.capture_end()
result = [chosen.num_rows, chosen.reason, happened]
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes say, one after the other, that share the folder of kernels, and the files in it."""
    home = tmp_path_factory.mktemp("tuned")
    variables = {"HSTU_KERNEL_CACHE": str(home / "kernels"), VARIABLE: None}
    variables |= dict.fromkeys(("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"))
    (first,) = run_on_stand_in([{"code": FIRST}], home, **variables)
    files = [json.loads(path.read_text()) for path in sorted((home / "kernels" / "tuning").iterdir())]
    second, in_a_graph = run_on_stand_in([{"code": SECOND}, {"code": IN_A_GRAPH, "graphs": True}], home, **variables)
    for outcome in (first, second, in_a_graph):
        assert outcome["error"] is None, outcome
    return {"first": first["result"], "files": files, "second": second["result"], "in a graph": in_a_graph["result"]}


@pytest.fixture(
    scope="module",
    params=["torch.OutOfMemoryError('NPU out of memory. Tried to allocate')", "RuntimeError('EL0004: Out of memory')"],
    ids=["torch", "driver"],
)
def without_memory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a process says that runs out of memory while it measures one of the choices."""
    job = {"code": NO_MEMORY.replace("{error}", request.param)}
    (outcome,) = run_on_stand_in([job], tmp_path_factory.mktemp("full"), **{VARIABLE: None})
    assert outcome["error"] is None, outcome
    return outcome["result"]


def rows_of(done: list[Any]) -> tuple[int, str]:
    """What a command's record says of the strips."""
    exit_code, stdout, stderr = done
    device = record({"exit_code": exit_code, "stdout": stdout, "stderr": stderr})["device"]
    return device["block_rows"], device["block_rows_reason"]


@on_stand_in
def test_the_first_process_measures_and_says_so(processes: dict[str, Any]) -> None:
    done, happened = processes["first"]
    assert rows_of(done) == (256, "measured now on Ascend910B-stand-in")
    assert happened == ["tuned"]


@on_stand_in
def test_what_was_measured_is_kept_with_what_it_is_for(processes: dict[str, Any]) -> None:
    (content,) = processes["files"]
    about = content["about"]
    assert (about["device"], about["torch"], about["kernel"]) == (
        "Ascend910B-stand-in",
        torch.__version__,
        "blocked_attention",
    )
    assert about["torch_npu"] == torch.__version__.partition("+")[0]
    assert "cann" not in about, "no shell has told where it is"
    assert about["key"] == ["torch.bfloat16", "2", "32"]
    assert content["config"] == {"num_rows": 256}
    assert set(content["median_ms"]) == {f"{config.num_rows} rows" for config in CANDIDATES}


@on_stand_in
def test_the_next_process_reads_it_and_measures_what_is_new(processes: dict[str, Any]) -> None:
    """Another dtype is; nothing is measured while a benchmark is timed, without a warm-up neither."""
    infer, e2e, layer, happened = processes["second"]
    assert rows_of(infer) == rows_of(e2e) == (256, "measured before on Ascend910B-stand-in")
    assert rows_of(layer) == (256, "measured now on Ascend910B-stand-in")
    assert happened == ["timed", "tuned", "timed"]


@on_stand_in
def test_memory_that_runs_out_is_of_this_process_alone(without_memory: list[Any]) -> None:
    """It says nothing of the chip: nothing is kept on disk, and nothing measured again before the next process."""
    first, second, happened, is_kept = without_memory
    for done in (first, second):
        assert rows_of(done) == (CANDIDATES[0].num_rows, "a guess: memory did not suffice to measure")
    assert happened == ["tuned"]
    assert not is_kept


@on_stand_in
def test_tables_show_it(processes: dict[str, Any]) -> None:
    device = json.loads(processes["first"][0][1])["device"]
    assert strips_line(device) == {"Strips of attention": "256 rows (measured now on Ascend910B-stand-in)"}
    del device["block_rows"]
    assert strips_line(device) == {}


@on_stand_in
def test_nothing_is_measured_while_a_graph_is_captured(processes: dict[str, Any]) -> None:
    assert processes["in a graph"] == [CANDIDATES[0].num_rows, "a guess while a graph is captured", []]


def test_the_version_of_cann_is_that_of_the_sourced_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(__version__="2.13.0"))
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    versions = {"torch": torch.__version__, "torch_npu": "2.13.0"}
    assert NpuBackend.versions() == versions
    told = tmp_path / f"{platform.machine()}-linux" / "ascend_toolkit_install.info"
    told.parent.mkdir()
    told.write_text("package_name=Ascend-cann-toolkit\nversion=9.1.0\ninnerversion=V100\n", encoding="utf-8")
    assert NpuBackend.versions() == versions | {"cann": "9.1.0"}


def test_a_choice_holds_for_the_code_of_strips_and_groups() -> None:
    assert {Path(path).name for path in SOURCES} == {"bucketed.py", "groups.py", "blocked.py"}
    assert all(Path(path).is_file() for path in SOURCES)


@pytest.mark.parametrize(
    "command",
    [
        ["infer", "--data-root", "nowhere"],
        ["train", "--data-root", "nowhere", "--out", "trained"],
        ["bench-layer", "--dry-run"],
        ["bench-e2e", "--dry-run"],
        ["bench-fused", "1", "--dry-run"],
    ],
    ids=lambda command: command[0],
)
def test_a_wrong_number_by_hand_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """By a device that pads, before data is looked for; others never ask."""
    monkeypatch.setenv(VARIABLE, "many")
    asked = [*command, "--device", "cpu", "--impl", "blocked"]
    if "--dry-run" in command:
        assert invoke(*asked).exit_code == 0
    monkeypatch.setattr(Backend, "few_shapes", True)
    assert "HSTU_BLOCK_ROWS takes a number of rows from 1 on, not 'many'" in failure_of(2, *asked)


def test_it_may_be_decided_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = (torch.device("cpu"), torch.float32, 4, 64)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert block_rows_for(*ask).num_rows == 512
    monkeypatch.setenv(VARIABLE, "96")
    assert (block_rows_for(*ask).num_rows, block_rows_for(*ask).reason) == (96, "HSTU_BLOCK_ROWS says so")
    for text in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(UsageError, match=f"HSTU_BLOCK_ROWS takes a number of rows from 1 on, not '{text}'"):
            block_rows_for(*ask)
