"""Whether Triton kernels can run, and what is said where they cannot: each case in a process of its own."""

import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from support.cli import record_of

from hstu_cli.backend import CudaBackend
from hstu_cli.kernels.triton.state import triton_state

ASK = """
from hstu_cli.kernels.triton.state import triton_state
state = triton_state()
print(state.available, state.reason)
"""


def state_in(setup: str, **environment: str) -> str:
    """What `triton_state` says after some setup."""
    command = [sys.executable, "-c", f"{setup}\n{ASK}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_not_installed() -> None:
    setup = "import sys; sys.modules['triton'] = None"
    assert state_in(setup) == "False triton is not installed; on Linux, pip install 'hstu[cuda]'\n"


def test_installed_but_broken() -> None:
    setup = (
        "import builtins\n"
        "find = builtins.__import__\n"
        "def load(name, *rest):\n"
        "    if name == 'triton': raise ImportError('libtriton.so: no such file')\n"
        "    return find(name, *rest)\n"
        "builtins.__import__ = load"
    )
    assert state_in(setup) == "False triton does not load (libtriton.so: no such file)\n"


def test_no_gpu() -> None:
    pytest.importorskip("triton")
    reason = CudaBackend.why_unavailable()
    if reason is None:
        pytest.skip("there is a GPU here")
    assert state_in("", TRITON_INTERPRET="0") == f"False {reason.rstrip('.')}\n"


def test_interpreted() -> None:
    triton = pytest.importorskip("triton")
    expected = f"True triton {triton.__version__}, interpreted on the CPU (TRITON_INTERPRET is set)\n"
    assert state_in("", TRITON_INTERPRET="1") == expected


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    triton = pytest.importorskip("triton")
    assert state_in("", TRITON_INTERPRET="0") == f"True triton {triton.__version__}\n"


OLD_GPU = """
from hstu_cli.backend import CudaBackend
class Old(CudaBackend):
    compute_capability = (7, 5)
    why_unavailable = classmethod(lambda kind: None)
    device_count = classmethod(lambda kind: 1)
from hstu_cli.kernels.triton import state
state.CudaBackend = Old
"""


def test_a_gpu_that_is_too_old() -> None:
    pytest.importorskip("triton")
    expected = "False the kernels need a GPU of compute capability 8.0 or newer, and one here has 7.5\n"
    assert state_in(OLD_GPU, TRITON_INTERPRET="0") == expected


def test_env_says_it() -> None:
    assert record_of("env")["triton"] == asdict(triton_state())
