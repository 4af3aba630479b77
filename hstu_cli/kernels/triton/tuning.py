"""Launch settings of Triton kernels: measured once per shape and device, and remembered on disk."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hstu_cli.backend import backend_of
from hstu_cli.kernels.native.build import cache_folder
from hstu_cli.kernels.triton.state import is_interpreting
from hstu_cli.kernels.tuning import Tuner

NO_RESOURCES = ("out of resource", "too many resources requested", "PassManager::run failed")
"""What messages of a RuntimeError say where a kernel asks for more than the chip has."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How to launch a kernel: one of the choices that tuning has.

    blocks: the kernel's block sizes by the name of the argument; variant: which way to compute, where a kernel has
    several. max_registers: for each thread, so that several blocks fit a multiprocessor; None: as the compiler likes.
    """

    blocks: tuple[tuple[str, int], ...] = ()
    num_warps: int = 4
    num_stages: int = 1
    variant: str = ""
    max_registers: int | None = None

    @classmethod
    def of(
        cls,
        *,
        num_warps: int,
        num_stages: int = 1,
        variant: str = "",
        max_registers: int | None = None,
        **blocks: int,
    ) -> "LaunchConfig":
        """With the block sizes as keywords, such as BLOCK_M=64."""
        return cls(tuple(blocks.items()), num_warps, num_stages, variant, max_registers)

    @property
    def label(self) -> str:
        """As tables show it."""
        sizes = " ".join(f"{name.removeprefix('BLOCK_')}={size}" for name, size in self.blocks)
        registers = f"registers={self.max_registers}" if self.max_registers is not None else ""
        return " ".join(
            filter(None, (self.variant, sizes, f"warps={self.num_warps} stages={self.num_stages}", registers))
        )

    def block(self, name: str) -> int:
        """One block size; KeyError if there is none of that name."""
        return dict(self.blocks)[name]

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch: the block sizes, num_warps, num_stages and maxnreg."""
        limits = {"maxnreg": self.max_registers} if self.max_registers is not None else {}
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages, **limits}

    def to_json(self) -> dict[str, Any]:
        """What names it in a file."""
        return {**self.options(), "variant": self.variant}


_pinned: dict[str, LaunchConfig] = {}  # for all threads: gradients are computed in others than their forward pass


@contextlib.contextmanager
def pinned_configs(configs: Mapping[str, LaunchConfig]) -> Iterator[None]:
    """Within this context the kernels of these names use these configurations, whatever would be chosen."""
    before = dict(_pinned)
    _pinned.update(configs)
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


def choose_config(
    kernel: str,
    key: tuple[Hashable, ...],
    configs: Sequence[LaunchConfig],
    run: Callable[[LaunchConfig], object],
    *,
    device: torch.device,
    source: str,
) -> LaunchConfig:
    """The configuration for a kernel on inputs like these.

    key: what the choice depends on; strings, numbers and the like, sizes rounded (`bucket`) so that keys are few.
    configs: the choices, the best guess first. run: computes with one of them; it may run any number of times.
    source: the file that holds the kernel (`__file__`); after a change to it everything is measured again.
    With a single choice, or in the interpreter, that is the first. While a graph is captured nothing is measured: it is
    the one chosen before, else the first. Raises UnavailableError where the device lacks resources for all.
    """
    pinned = _pinned.get(kernel)
    if pinned is not None:
        return pinned
    if len(configs) == 1 or is_interpreting():
        return configs[0]
    return _tuner(device).choose(kernel, key, configs, run, source)


def bucket(size: int) -> int:
    """The next power of two: sizes that share a choice."""
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def _tuner(device: torch.device) -> "TritonTuner":
    import triton

    versions = {"triton": triton.__version__, "torch": torch.__version__}
    return TritonTuner(backend_of(device), cache_folder() / "tuning", versions)


class TritonTuner(Tuner[LaunchConfig]):
    """Chooses launch settings of Triton kernels."""

    what = "Triton kernel"
    way_out = "choose --impl blocked"

    def failures(self) -> tuple[type[Exception], ...]:
        """See `Tuner`: of compiling or launching a kernel."""
        from triton.runtime.errors import OutOfResources, PTXASError

        return OutOfResources, PTXASError, RuntimeError

    def is_too_large(self, error: Exception) -> bool:
        """See `Tuner`."""
        if isinstance(error, torch.OutOfMemoryError):
            return False  # of this moment, not of this chip
        if isinstance(error, RuntimeError):
            return any(part in str(error) for part in NO_RESOURCES)
        return True
