"""Ascend NPUs through torch_npu, and what is said where it is missing or broken."""

import importlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from hstu_cli.backend.base import BROKEN
from hstu_cli.backend.streams import StreamBackend

DISTRIBUTIONS = {"yaml": "pyyaml", "pkg_resources": "setuptools", "attr": "attrs", "google": "protobuf"}
"""What to install for a module of another name, of those that torch_npu and CANN's Python parts import."""

WITHOUT_BF16 = re.compile(r"Ascend(310P|910((Pro|Premium)?[AB])?$)")
"""Names of the first Ascend 910 and of 310P, which lack bf16; later ones are such as 910B1 and 910_9391.

For a torch_npu without `is_bf16_supported`.
"""

TORCH_RELEASES = ("2.11", "2.12", "2.13")
"""Minor releases of torch that this package runs on."""


class NpuBackend(StreamBackend):
    """An Ascend NPU, through torch_npu."""

    type = "npu"
    graph_class = "NPUGraph"
    how_to_list = "npu-smi info lists the NPUs of this machine, and ASCEND_RT_VISIBLE_DEVICES hides some of them"
    few_shapes = True
    why_graphs_only_on_request = "no NPU has run captured graphs yet, so they are for those who ask with --cuda-graph"

    @classmethod
    def module(cls) -> Any:
        """See `StreamBackend`."""
        return torch.npu

    @classmethod
    def why_unavailable(cls) -> str | None:
        """See `Backend`."""
        if wrong := _wrong_torch_npu():
            return wrong
        try:
            importlib.import_module("torch_npu")  # registers torch.npu
        except ModuleNotFoundError as error:
            if error.name != "torch_npu":
                package = DISTRIBUTIONS.get(str(error.name).partition(".")[0], str(error.name).partition(".")[0])
                return f"torch_npu does not load ({error}); install what it lacks: pip install {package}."
            return (
                "torch_npu is not installed; install Ascend's CANN toolkit, what torch_npu needs and does not ask for "
                f"(pip install pyyaml setuptools), then: {_torch_npu_for(torch.__version__)} (docs/npu.md)."
            )
        except (ImportError, OSError, RuntimeError) as error:
            return (
                f"torch_npu does not load ({_first_line(error)}); CANN is not installed or not on the library path: "
                "source /usr/local/Ascend/ascend-toolkit/set_env.sh, or that of your CANN, and try again."
            )
        except BROKEN as error:
            return f"torch_npu does not load ({_first_line(error)}); install it and its CANN anew (docs/npu.md)."
        try:
            found = torch.npu.is_available() and torch.npu.device_count() > 0
        except BROKEN as error:
            reason = _first_line(error)
            return f"torch_npu cannot use its driver ({reason}); check that npu-smi info works for this user."
        return None if found else f"torch_npu finds no NPU; {cls.how_to_list}."

    @property
    def default_dtype(self) -> str:
        """See `Backend`: bf16, or fp16 on a chip without it."""
        is_supported = getattr(self.module(), "is_bf16_supported", None)
        with_bf16 = is_supported() if is_supported is not None else not WITHOUT_BF16.match(self.device_name)
        return "bf16" if with_bf16 else "fp16"

    @classmethod
    def versions(cls) -> dict[str, str]:
        """See `Backend`: of torch_npu too, and of CANN where its shell variables say where it is."""
        found = super().versions() | {"torch_npu": str(importlib.import_module("torch_npu").__version__)}
        if cann := _cann_version():
            found["cann"] = cann
        return found

    def why_no_graphs(self) -> str | None:
        """See `Backend`; and torch_npu captures nothing with the queue that moves workspaces, too."""
        if os.environ.get("TASK_QUEUE_ENABLE") == "2":
            return "torch_npu captures no graphs with TASK_QUEUE_ENABLE=2; set it to 1"
        return super().why_no_graphs()

    def tune_process(self) -> None:
        """See `StreamBackend`: and operators come compiled, as they do by default on the newer chips alone.

        A torch_npu that has no such switch keeps its default.
        """
        super().tune_process()
        set_compile_mode = getattr(self.module(), "set_compile_mode", None)
        if set_compile_mode is not None:
            set_compile_mode(jit_compile=False)


def _cann_version() -> str | None:
    """Of the toolkit whose `set_env.sh` this shell has sourced, as its own file of installation tells it."""
    home = os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")
    if home is None:
        return None
    try:
        text = Path(home, f"{platform.machine()}-linux", "ascend_toolkit_install.info").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    version = re.search(r"^version=(\S+)", text, re.MULTILINE)
    return version[1] if version else None


def _wrong_torch_npu() -> str | None:
    """What is wrong where torch_npu is installed for another torch; loading it would end in an unknown symbol."""
    try:
        installed = _release(importlib.metadata.version("torch_npu"))
    except importlib.metadata.PackageNotFoundError:
        return None
    wanted = _release(torch.__version__)
    if installed == wanted:
        return None
    ways = [_torch_npu_for(wanted)]
    if installed.rpartition(".")[0] in TORCH_RELEASES:
        ways.insert(0, f"pip install 'torch=={installed}'")
    return f"torch_npu {installed} is not for torch {wanted}; bring them together: {', or '.join(ways)}."


def _torch_npu_for(version: str) -> str:
    """How to get the torch_npu of a torch: a patch release may have none, the first of its minor release has one."""
    release = _release(version)
    first = f"{release.rpartition('.')[0]}.0"
    command = f"pip install 'torch_npu=={release}.*'"
    if release == first:
        return command
    return f"{command}, or where there is none: pip install 'torch=={first}' && pip install 'torch_npu=={first}.*'"


def _release(version: str) -> str:
    """The release of a version, such as 2.13.0 of 2.13.0.post1 or 2.13.0+cpu."""
    return ".".join(re.findall(r"\d+", version)[:3])


def _first_line(error: Exception) -> str:
    """What an error says, with its class where that says more: a KeyError is its key alone."""
    line = str(error).strip().partition("\n")[0]
    told = isinstance(error, ImportError | OSError | RuntimeError) and line
    return line if told else f"{type(error).__name__}: {line}"
