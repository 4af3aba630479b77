"""Launch settings of Triton kernels: measured once per shape and device, and remembered on disk."""

import contextlib
import functools
import hashlib
import json
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hstu_cli.backend import Backend, backend_of
from hstu_cli.errors import UnavailableError
from hstu_cli.kernels.native.build import cache_folder
from hstu_cli.kernels.triton.state import is_interpreting

ROUNDS = 10
"""Measurements of each configuration, in turn with the others."""

AHEAD_BYTES, AHEAD_TIMES = 1 << 26, 4
"""Memory that is zeroed so many times before each measurement.

The device is busy with it while the launch is prepared, so that the events enclose the kernel alone; and it leaves
nothing of the inputs in the caches, whatever ran before.
"""

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
def _tuner(device: torch.device) -> "Tuner":
    import triton

    versions = {"triton": triton.__version__, "torch": torch.__version__}
    return Tuner(backend_of(device), cache_folder() / "tuning", versions)


class Tuner:
    """The choices for one device: in memory, else on disk, else measured.

    Each choice is a file of its own, written beside its place and renamed: processes that measure the same thing at
    once overwrite each other's whole files. Without a folder that can be written to, each process measures for itself.
    """

    def __init__(self, backend: Backend, folder: Path, versions: Mapping[str, str]) -> None:
        self._backend, self._folder = backend, folder
        self._about = {"device": backend.device_name, **versions}
        self._choices: dict[tuple[str, tuple[Hashable, ...]], LaunchConfig] = {}
        self._lock = threading.RLock()  # what is measured may itself have a choice to make

    def choose(
        self,
        kernel: str,
        key: tuple[Hashable, ...],
        configs: Sequence[LaunchConfig],
        run: Callable[[LaunchConfig], object],
        source: str,
    ) -> LaunchConfig:
        """See `choose_config`."""
        known = self._choices.get((kernel, key))
        if known is not None:
            return known
        with self._lock:
            chosen = self._choices.get((kernel, key))
            if chosen is None:
                about = {**self._about, "kernel": kernel, "key": list(map(str, key)), "source": _hash_of_file(source)}
                chosen = self._read(about, configs)
                if chosen is None:
                    if self._backend.is_capturing():
                        return configs[0]
                    medians = self._measure(kernel, configs, run)
                    chosen = min(medians, key=medians.__getitem__)
                    self._write(about, chosen, medians)
                self._choices[kernel, key] = chosen
        return chosen

    def _measure(
        self, kernel: str, configs: Sequence[LaunchConfig], run: Callable[[LaunchConfig], object]
    ) -> dict[LaunchConfig, float]:
        """Median milliseconds of each configuration that the device has the resources for."""
        usable, failures = [], []
        with self._backend.as_current():
            for config in configs:
                try:
                    run(config)  # compiles
                    self._backend.synchronize()
                    usable.append(config)
                except _launch_errors() as error:
                    if not _lacks_resources(error):
                        raise
                    failures.append(f"{config.label}: {error}")
            if not usable:
                raise UnavailableError(
                    f"{self._backend.device_name} has not the resources for any configuration of the Triton kernel "
                    f"{kernel}; choose --impl blocked. {'; '.join(failures)}"
                )
            ahead = self._work_ahead()
            timers: dict[LaunchConfig, list[Any]] = {config: [] for config in usable}
            for _ in range(ROUNDS):
                for config in usable:
                    ahead()
                    timer = self._backend.start_timer()
                    run(config)
                    timer.stop()
                    timers[config].append(timer)
            self._backend.synchronize()
        return {config: statistics.median(timer.elapsed_ms() for timer in row) for config, row in timers.items()}

    def _work_ahead(self) -> Callable[[], None]:
        """Queues work that ends after the launch behind it is prepared; none on a CPU, which has no queue."""
        if self._backend.type == "cpu":
            return lambda: None
        memory = torch.empty(AHEAD_BYTES, dtype=torch.uint8, device=self._backend.device)

        def ahead() -> None:
            for _ in range(AHEAD_TIMES):
                memory.zero_()

        return ahead

    def _path(self, about: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{about['kernel']}-{digest[:24]}.json"

    def _read(self, about: Mapping[str, Any], configs: Sequence[LaunchConfig]) -> LaunchConfig | None:
        """The choice on disk; None where there is none that is whole, about this, and still one of the choices."""
        try:
            content = json.loads(self._path(about).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # absent, unreadable or damaged
            return None
        if not isinstance(content, dict) or content.get("about") != about:
            return None
        return next((config for config in configs if _as_json(config) == content.get("config")), None)

    def _write(self, about: Mapping[str, Any], chosen: LaunchConfig, medians: Mapping[LaunchConfig, float]) -> None:
        content = {
            "about": about,
            "config": _as_json(chosen),
            "median_ms": {config.label: milliseconds for config, milliseconds in medians.items()},
        }
        with contextlib.suppress(OSError):  # it is measured again in the next process
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, name = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1)
                Path(name).replace(self._path(about))
            finally:
                Path(name).unlink(missing_ok=True)


@functools.cache
def _launch_errors() -> tuple[type[Exception], ...]:
    """What compiling or launching a kernel raises, for lack of resources among other reasons."""
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, RuntimeError


def _lacks_resources(error: Exception) -> bool:
    """Whether a configuration failed because the device is too small for it, and others may not."""
    if isinstance(error, torch.OutOfMemoryError):
        return False  # of this moment, not of this chip
    if isinstance(error, RuntimeError):
        return any(part in str(error) for part in NO_RESOURCES)
    return True


def _as_json(config: LaunchConfig) -> dict[str, Any]:
    return {**config.options(), "variant": config.variant}


@functools.cache
def _hash_of_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
