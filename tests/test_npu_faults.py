"""What is said where torch_npu is missing, broken or for another torch, or finds no device."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from support.cli import failure_of, invoke, record_of

from hstu_cli.backend import NpuBackend
from hstu_cli.backend.npu import TORCH_RELEASES
from hstu_cli.errors import UnavailableError

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
RELEASE = torch.__version__.partition("+")[0]
INFER = ["infer", "--config", "tiny", "--steps", "1", "--device", "npu"]


def install(folder: Path, code: str, version: str | None = RELEASE, *, autoload: bool = False) -> None:
    """A package torch_npu with this code, and what pip would say of it."""
    package = folder / "torch_npu"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code, encoding="utf-8")
    if version is not None:
        info = folder / f"torch_npu-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n", encoding="utf-8"
        )
        if autoload:
            entry = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
            (info / "entry_points.txt").write_text(entry, encoding="utf-8")


NO_CANN = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')"


@pytest.mark.skipif("torch_npu" in sys.modules, reason="torch_npu is here")
@pytest.mark.parametrize(
    ("code", "version", "messages"),
    [
        (NO_CANN, RELEASE, ["libhccl.so: cannot open shared object file", "source /usr/local/Ascend", "set_env.sh"]),
        (
            "raise RuntimeError('Failed to load torch_npu\\nmore')",
            RELEASE,
            ["(Failed to load torch_npu)", "set_env.sh"],
        ),
        ("raise SystemExit('not to be loaded')", "2.1.0.post13", ["2.1.0 is not for torch", f"torch_npu=={RELEASE}.*"]),
        ("import a_package_that_nobody_has", RELEASE, ["pip install a_package_that_nobody_has"]),
        ("import a_package_that_nobody_has", f"{RELEASE}.post2", ["pip install a_package_that_nobody_has"]),
        ("import torch; torch.no_such_name", RELEASE, ["does not load (AttributeError: module 'torch' has no", "anew"]),
        ("{}['ASCEND_HOME_PATH']", RELEASE, ["does not load (KeyError: 'ASCEND_HOME_PATH')"]),
        ("assert False, 'no license'", RELEASE, ["does not load (AssertionError: no license)"]),
        ("raise OSError('libascendcl.so: no')", RELEASE, ["does not load (libascendcl.so: no)", "set_env.sh"]),
    ],
    ids=[
        "no CANN",
        "fails to load",
        "another torch",
        "lacks a package",
        "post-release",
        "attribute",
        "key",
        "assertion",
        "library",
    ],
)
def test_a_torch_npu_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, version: str, messages: list[str]
) -> None:
    install(tmp_path / "site", code, version)
    monkeypatch.syspath_prepend(tmp_path / "site")
    said = failure_of(3, *INFER)
    assert "--device npu: torch_npu" in said
    assert all(message in said for message in messages), said


@pytest.mark.skipif("torch_npu" in sys.modules, reason="torch_npu is here")
@pytest.mark.parametrize(
    ("torch_version", "npu_version", "ways"),
    [
        (
            "2.12.0+cpu",
            "2.11.0.post3",
            ["pip install 'torch==2.11.0'", "or pip install 'torch_npu==2.12.0.*'"],
        ),
        (
            "2.12.1",
            "2.12.0",
            [
                "pip install 'torch==2.12.0', or",
                "pip install 'torch_npu==2.12.1.*', or where there is none: pip install 'torch==2.12.0'",
                "&& pip install 'torch_npu==2.12.0.*'",
            ],
        ),
        (
            "2.12.1",
            None,
            ["is not installed", "'torch_npu==2.12.1.*', or where there is none: pip install 'torch==2.12.0'"],
        ),
    ],
    ids=["minor releases", "patch release", "none for a patch release"],
)
def test_every_command_that_is_offered_can_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch_version: str, npu_version: str | None, ways: list[str]
) -> None:
    """Of torch_npu there are releases x.y.0; torch has patch releases besides, and some torch this package runs on."""
    if npu_version is not None:
        install(tmp_path / "site", "raise SystemExit('not to be loaded')", npu_version)
        monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(torch, "__version__", torch_version)
    said = NpuBackend.why_unavailable()
    assert all(way in said for way in ways), said


def test_no_torch_is_offered_that_this_package_does_not_run_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path / "site", "raise SystemExit('not to be loaded')", "2.10.0")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "torch==2.10" not in NpuBackend.why_unavailable()
    requirement = re.search(r'"torch>=([\d.]+),<([\d.]+)"', PYPROJECT.read_text(encoding="utf-8"))
    lowest, beyond = (tuple(int(n) for n in version.split(".")) for version in requirement.groups())
    releases = [tuple(int(n) for n in release.split(".")) for release in TORCH_RELEASES]
    assert releases == [(2, minor) for minor in range(lowest[1], beyond[1])]


@pytest.mark.skipif(NpuBackend.why_unavailable() is None, reason="torch_npu is here")
def test_no_torch_npu() -> None:
    said = failure_of(3, *INFER)
    assert "torch_npu is not installed; install Ascend's CANN toolkit" in said
    assert "pip install pyyaml setuptools" in said
    assert f"pip install 'torch_npu=={RELEASE}.*'" in said


def driver_fails() -> bool:
    raise RuntimeError("Initialize: aclInit failed, error code is 507008\nmore lines")


def driver_lacks_a_key() -> bool:
    return {}["npu"]


def driver_lacks_a_library() -> bool:
    raise OSError("libascend_hal.so: cannot open shared object file")


@pytest.mark.parametrize(
    ("is_available", "message"),
    [
        (lambda: False, "torch_npu finds no NPU; npu-smi info lists the NPUs of this machine, and ASCEND_RT_VISIBLE"),
        (driver_fails, "cannot use its driver (Initialize: aclInit failed, error code is 507008); check that npu-smi"),
        (driver_lacks_a_key, "cannot use its driver (KeyError: 'npu'); check that npu-smi"),
        (driver_lacks_a_library, "cannot use its driver (libascend_hal.so: cannot open shared object file); check"),
        (None, "cannot use its driver (TypeError: 'NoneType' object is not callable); check that npu-smi"),
    ],
    ids=["no visible device", "driver", "key", "library", "type"],
)
def test_no_device(monkeypatch: pytest.MonkeyPatch, is_available: object, message: str) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    module = types.SimpleNamespace(is_available=is_available, device_count=lambda: 0)
    monkeypatch.setattr(torch, "npu", module, raising=False)
    assert message in failure_of(3, *INFER)
    assert message.partition(";")[0] in record_of("env")["backends"]["npu"]["reason"]


@pytest.mark.skipif("torch_npu" in sys.modules, reason="torch_npu is here")
def test_auto_takes_another_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path / "site", "{}['ASCEND_HOME_PATH']")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert record_of(*INFER[:-2], "--impl", "blocked")["device"]["actual"] != "npu:0"


def test_a_run_that_fails_says_why_without_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hstu env` shows tables of a finished record alone."""

    def fails() -> None:
        raise UnavailableError("the driver is gone")

    monkeypatch.setattr("hstu_cli.kernels.triton.state.triton_state", fails)
    result = invoke("env")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["status"] == "invalid"
    assert "the driver is gone" in " ".join(found["reasons"])
    assert "the driver is gone" in result.stderr


@pytest.mark.parametrize("device", ["npu:", "cuda:", "auto:", "cpu:"])
def test_a_colon_without_an_index_is_no_device(device: str) -> None:
    assert f"There is no device {device!r}" in failure_of(2, *INFER[:-1], device).replace('"', "'")


def test_an_index_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    module = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 8)
    monkeypatch.setattr(torch, "npu", module, raising=False)
    said = failure_of(3, *INFER[:-1], "npu:8")
    assert "--device npu:8: there are only npu:0 to npu:7; npu-smi info lists" in said


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("command", [INFER, ["bench-layer", "--device", "npu:3"], ["bench-e2e", "--device", "npu"]])
def test_what_no_npu_can_run_is_the_command_lines_fault(command: list[str], impl: str) -> None:
    """Whether torch_npu is here or not."""
    assert "not on npu" in failure_of(2, *command, "--impl", impl)


@pytest.mark.parametrize(
    "command",
    [
        [*INFER, "--page-size", "48"],
        *([name, "--device", "npu", "--page-size", "48"] for name in ("bench-layer", "bench-e2e")),
    ],
    ids=lambda command: command[0],
)
def test_pages_that_ascends_operators_cannot_read_are_the_command_lines_fault(command: list[str]) -> None:
    """Whether torch_npu and RecSDK are here or not."""
    said = failure_of(2, *command, "--impl", "ascend")
    assert "--page-size 48: impl='ascend' takes pages of 32, 64, 128 or 256 tokens, not 48" in said


@pytest.mark.parametrize(
    ("device", "impl", "can"),
    [("npu", "reference", "blocked"), ("npu:1", "ascend", "blocked"), ("cuda", "blocked", "triton")],
)
def test_an_implementation_that_no_graph_holds_is_the_command_lines_fault(device: str, impl: str, can: str) -> None:
    """Whether the device is here or not."""
    said = failure_of(2, *INFER[:-1], device, "--impl", impl, "--cuda-graph")
    assert f"--cuda-graph: impl {impl} reads a batch's sizes on the host, so it cannot be captured; {can} can" in said


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ascends_operators_are_for_npus(device: str) -> None:
    assert f"runs on an NPU, not on {device}" in failure_of(2, *INFER[:-1], device, "--impl", "ascend")


def test_a_broken_torch_npu_does_not_break_other_devices(tmp_path: Path) -> None:
    """`import torch` loads what announces itself as a backend, and fails where that fails."""
    install(tmp_path / "site", NO_CANN, autoload=True)
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]),
        "HSTU_HOME": str(tmp_path),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )

    assert run("-c", "import torch").returncode != 0
    done = run("-m", "hstu_cli", "env", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert "libhccl.so" in done.stdout
