"""Jobs on the stand-in for torch_npu, from a test's process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

STAND_IN = Path(__file__).parent / "npu_stand_in"


def why_no_stand_in() -> str | None:
    """Why there can be no stand-in device with this torch, or None."""
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return f"torch {torch.__version__} cannot take a backend written in Python"
    if not hasattr(torch._C, "_acc") or not hasattr(torch._C._acc, "create_empty_tensor"):
        return f"torch {torch.__version__} cannot make a tensor of a backend written in Python"
    return None


def run_on_stand_in(jobs: list[dict[str, Any]], home: Path, **variables: str | None) -> list[dict[str, Any]]:
    """What `npu_stand_in/run.py` says of the jobs; data is prepared under `home`.

    variables: of the environment, None for one that is not set. Strips have 512 rows unless these say otherwise: what
    would be measured is the CPU.
    """
    wanted = {"HSTU_HOME": str(home), "HOME": str(home), "OMP_NUM_THREADS": "1", "HSTU_BLOCK_ROWS": "512"}
    changed = {**os.environ, **wanted, "TRITON_INTERPRET": None, **variables}
    environment = {name: value for name, value in changed.items() if value is not None}
    command = [sys.executable, str(STAND_IN / "run.py")]
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, env=environment, cwd=home, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def record(outcome: dict[str, Any]) -> dict[str, Any]:
    """The JSON record of a command that must have succeeded."""
    assert outcome["exit_code"] == 0, outcome["stderr"]
    return json.loads(outcome["stdout"])
