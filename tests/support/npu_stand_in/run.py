"""Runs jobs on the stand-in device, in a process of its own: a JSON list on stdin, one of results on stdout.

A job is {"args": [...]}, a command line of hstu, or {"code": "..."}, Python whose variable `result` is wanted.
"unpadded" turns padding to few shapes off; "graphs" makes torch_npu one that has graphs; "watched" also asks torch
itself which operators meet the device. Packages that an NPU must not need are blocked, and so is CUDA, in whatever
torch this is.
"""

import io
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BLOCKED = {"triton", "flashinfer", "dynamicemb", "fbgemm_gpu", "torchrec"}


class CudaUsedError(Exception):
    """Something asked for a CUDA device."""


class Block:
    """Says that the blocked packages are not there."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")


def main() -> None:
    """Do the jobs one after the other."""
    sys.meta_path.insert(0, Block())
    sys.path.insert(0, str(HERE))
    jobs = json.load(sys.stdin)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.cuda._lazy_init = refuse_cuda
    torch.set_num_threads(1)
    import torch_npu

    results = [run(job, torch_npu.RECORDER) for job in jobs]
    json.dump(results, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # the device's memory is freed by Python code, which must not run while the interpreter goes down


def refuse_cuda() -> None:
    """What torch calls before it does anything on a CUDA device, whether it is built with CUDA or not."""
    raise CudaUsedError("a CUDA device on the way of an NPU")


def run(job: dict[str, Any], recorder: Any) -> dict[str, Any]:
    """One job and what it asked of the device."""
    from hstu_cli.backend import NpuBackend
    from hstu_cli.bench import ceilings

    ceilings.MATMUL_SIZE |= {"npu": 64, "cpu": 64}
    ceilings.COPY_BYTES |= {"npu": 1 << 12, "cpu": 1 << 12}
    NpuBackend.few_shapes = not job.get("unpadded", False)
    sys.modules["torch"].npu.offer_graphs(job.get("graphs", False))
    recorder.take()
    with watching(job.get("watched", False)) as watched:
        outcome = run_code(job["code"]) if "code" in job else run_command(job["args"])
    return outcome | {"recorded": recorder.take(), "watched": sorted(watched)}


def run_code(code: str) -> dict[str, Any]:
    """What the code leaves in `result`, or its error; the device is waited for, which may find one more."""
    import torch

    names: dict[str, Any] = {"result": None}
    try:
        with redirect_stdout(io.StringIO()):
            exec(code, names)
            torch.npu.finish()
    except Exception as error:  # noqa: BLE001 - the error is what the test asks for
        return {"result": None, "error": type(error).__name__, "message": str(error)}
    return {"result": names["result"], "error": None}


@contextmanager
def watching(wanted: bool) -> Iterator[set[str]]:
    """The operators with a tensor of the device that torch's dispatcher hands down, if they are wanted."""
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            leaves = pytree.tree_leaves((args, kwargs, result))
            if any(getattr(getattr(leaf, "device", None), "type", None) == "npu" for leaf in leaves):
                seen.add(str(function).removeprefix("aten."))
            return result

    with Watch() if wanted else nullcontext():
        yield seen


def run_command(arguments: list[str]) -> dict[str, Any]:
    """A command line: its exit code and what it wrote; a bug's traceback joins stderr."""
    from typer.testing import CliRunner

    from hstu_cli.cli import app

    result = CliRunner().invoke(app, arguments)
    bug = result.exception if not isinstance(result.exception, SystemExit) else None
    trace = "".join(traceback.format_exception(bug)) if bug is not None else ""
    return {"exit_code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr + trace}


if __name__ == "__main__":
    main()
