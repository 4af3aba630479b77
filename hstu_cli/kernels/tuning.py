"""Chooses between ways to compute the same on a device: measured once for what the choice depends on, kept on disk."""

import contextlib
import functools
import hashlib
import json
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from hstu_cli.backend import Backend
from hstu_cli.errors import UnavailableError

ROUNDS = 10
"""Measurements of each configuration, in turn with the others."""

AHEAD_BYTES, AHEAD_TIMES = 1 << 26, 4
"""Memory that is zeroed so many times before each measurement.

The device is busy with it while the launch is prepared, so that the events enclose the kernel alone; and it leaves
nothing of the inputs in the caches, whatever ran before.
"""


class Config(Hashable, Protocol):
    """One of the choices."""

    @property
    def label(self) -> str:
        """As tables show it."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What names it in a file."""
        ...


C = TypeVar("C", bound=Config)


class Tuner(Generic[C]):
    """The choices for one device: in memory, else on disk, else measured.

    Each choice is a file of its own, written beside its place and renamed: processes that measure the same thing at
    once overwrite each other's whole files. Without a folder that can be written to, each process measures for itself.
    """

    what: ClassVar[str] = "operator"
    """What the choices are for, in a message; `way_out` is its advice where the device is too small for all of them."""
    way_out: ClassVar[str] = "choose another --impl"

    def __init__(self, backend: Backend, folder: Path, versions: Mapping[str, str]) -> None:
        self._backend, self._folder = backend, folder
        self._about = {"device": backend.device_name, **versions}
        self._choices: dict[tuple[str, tuple[Hashable, ...]], tuple[C, str]] = {}  # with where it is from
        self._lock = threading.RLock()  # what is measured may itself have a choice to make

    def choose(
        self,
        kernel: str,
        key: tuple[Hashable, ...],
        configs: Sequence[C],
        run: Callable[[C], object],
        source: str,
        *more_sources: str,
    ) -> C:
        """The fastest of the configurations.

        kernel: what they are for. key: what the choice depends on; strings, numbers and the like, sizes rounded so
        that keys are few. configs: the choices, the best guess first, which is taken, and not kept, while a graph is
        captured. run: computes with one of them; it may run any number of times. source and more_sources: the files
        with the code that runs; after a change to one everything is measured again. Raises UnavailableError where the
        device lacks resources for all, and whatever else `run` raises, running out of memory included: nothing is kept
        then.
        """
        known = self._choices.get((kernel, key))
        if known is not None:
            return known[0]
        with self._lock:
            if (kernel, key) not in self._choices:
                about = {
                    **self._about,
                    "kernel": kernel,
                    "key": list(map(str, key)),
                    "source": _hash_of_files(source, *more_sources),
                }
                chosen, reason = self._read(about, configs), "measured before"
                if chosen is None:
                    if self._backend.is_capturing():
                        return configs[0]
                    medians = self._measure(kernel, configs, run)
                    chosen, reason = min(medians, key=medians.__getitem__), "measured now"
                    self._write(about, chosen, medians)
                self._choices[kernel, key] = chosen, f"{reason} on {self._backend.device_name}"
            return self._choices[kernel, key][0]

    def settle(self, kernel: str, key: tuple[Hashable, ...], config: C, reason: str) -> C:
        """Take a configuration unmeasured for the rest of this process, for a reason; the next process measures."""
        with self._lock:
            return self._choices.setdefault((kernel, key), (config, reason))[0]

    def reason(self, kernel: str, key: tuple[Hashable, ...]) -> str | None:
        """Where a choice is from, as reports show it; None where none was made."""
        return self._choices.get((kernel, key), (None, None))[1]

    def failures(self) -> tuple[type[Exception], ...]:
        """What running a configuration may raise for lack of resources, among other reasons."""
        return (RuntimeError,)

    def is_too_large(self, error: Exception) -> bool:
        """Whether a configuration failed because the device is too small for it, and others may not.

        Memory that ran out is no such reason: it lacks at this moment, and the choice is kept for good.
        """
        return False

    def _measure(self, kernel: str, configs: Sequence[C], run: Callable[[C], object]) -> dict[C, float]:
        """Median milliseconds of each configuration that the device has the resources for."""
        usable, failures = [], []
        with self._backend.as_current():
            for config in configs:
                try:
                    run(config)  # compiles
                    self._backend.synchronize()
                    usable.append(config)
                except self.failures() as error:
                    if not self.is_too_large(error):
                        raise
                    failures.append(f"{config.label}: {error}")
            if not usable:
                raise UnavailableError(
                    f"{self._backend.device_name} has not the resources for any configuration of the {self.what} "
                    f"{kernel}; {self.way_out}. {'; '.join(failures)}"
                )
            ahead = self._work_ahead()
            timers: dict[C, list[Any]] = {config: [] for config in usable}
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

    def _read(self, about: Mapping[str, Any], configs: Sequence[C]) -> C | None:
        """The choice on disk; None where there is none that is whole, about this, and still one of the choices."""
        try:
            content = json.loads(self._path(about).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # absent, unreadable or damaged
            return None
        if not isinstance(content, dict) or content.get("about") != about:
            return None
        return next((config for config in configs if config.to_json() == content.get("config")), None)

    def _write(self, about: Mapping[str, Any], chosen: C, medians: Mapping[C, float]) -> None:
        content = {
            "about": about,
            "config": chosen.to_json(),
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
def _hash_of_files(*paths: str) -> str:
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()
