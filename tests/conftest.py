"""Fixtures and settings that every test shares."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tests run one process per core: more threads in each would only wait for one another.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "hstu", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("hstu")

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
