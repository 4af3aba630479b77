"""Fixtures and settings that every test shares."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from hstu_cli.backend import CudaBackend, NpuBackend
from hstu_cli.bench import ceilings
from hstu_cli.kernels.native.build import CACHE_VARIABLE, cache_folder, native_state
from hstu_cli.kernels.triton.state import triton_state

# Tests run one process per core: more threads in each would only wait for one another.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests get a home folder each; the kernels are built once for all of them.
os.environ.setdefault(CACHE_VARIABLE, str(cache_folder()))

# Without a GPU Triton's kernels run in its interpreter, which is chosen before they are defined.
if CudaBackend.why_unavailable():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "hstu", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("hstu")


@pytest.fixture(scope="module")
def poisoned_memory():
    """New memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks inside this process measure the machine with a small product and a small copy."""
    monkeypatch.setitem(ceilings.MATMUL_SIZE, "cpu", 256)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 20)


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of a device skip where it is absent, and say what is missing."""
    for backend in (CudaBackend, NpuBackend):
        marker = {"cuda": "gpu"}.get(backend.type, backend.type)
        if item.get_closest_marker(marker) and (reason := backend.why_unavailable()):
            pytest.skip(reason)
    if item.get_closest_marker("native") and not (state := native_state()).available:
        pytest.skip(state.reason)
    if item.get_closest_marker("triton") and not (state := triton_state()).available:
        pytest.skip(state.reason)


SAMPLE_ARCHIVE = "KuaiRand-Pure-sample.tar.gz"
SAMPLE_MD5 = "3caa8bfc7a72eab5f0a48be7140aea9c"


@pytest.fixture(autouse=True)
def _hermetic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees or changes the user's data folders, and each starts from the same seed."""
    for variable in ("HSTU_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sample_archive() -> Path:
    """Real KuaiRand rows, where this machine has them."""
    folder = os.environ.get("HSTU_TEST_DATA")
    if not folder:
        pytest.skip(f"HSTU_TEST_DATA is not set: no folder with {SAMPLE_ARCHIVE}")
    path = Path(folder, SAMPLE_ARCHIVE)
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    return path
