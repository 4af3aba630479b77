"""Devices behind one interface: what there is, why something is not, and what to wait for.

Only this file names `torch.cuda` and `torch.npu`.
"""

import contextlib
import functools
import importlib
import math
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.hardware import (
    HARDWARE_PRESETS,
    HardwarePreset,
    available_memory_bytes,
    cpu_name,
    keep_freed_memory,
    physical_memory_bytes,
    release_freed_memory,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Event:
    """A moment in a queue of work. On a CPU, where queued work is done at once, it has passed already."""

    def wait(self) -> None:
        """Make all compute work that is queued from now on come after this moment."""

    def synchronize(self) -> None:
        """Block this thread until the moment has passed."""


class WallTimer:
    """A stretch of time by the clock on the wall; begins when it is made."""

    def __init__(self) -> None:
        self._start = self._end = time.perf_counter()

    def stop(self) -> None:
        """End of the stretch."""
        self._end = time.perf_counter()

    def elapsed_ms(self) -> float:
        """Its length."""
        return (self._end - self._start) * 1e3


class StreamTimer:
    """A stretch of a device's compute stream, between two of its events; begins when it is made."""

    def __init__(self, device_module: Any) -> None:
        self._start, self._end = (device_module.Event(enable_timing=True) for _ in range(2))
        self._start.record()

    def stop(self) -> None:
        """End of the stretch."""
        self._end.record()

    def elapsed_ms(self) -> float:
        """Its length, once the device is synchronised."""
        return self._start.elapsed_time(self._end)


class Backend:
    """A plain CPU; the accelerators below replace what differs."""

    type = "cpu"
    default_dtype = "fp32"
    cache_memory_share = 0.25
    """Share of the device's memory that a KV cache takes unless its size is given."""

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device(self.type) if self.type == "cpu" else torch.device(self.type, index)

    @classmethod
    def why_unavailable(cls) -> str | None:
        """What is missing, as a sentence that says how to get it; None where this backend works."""
        return None

    @classmethod
    def device_count(cls) -> int:
        """Devices of this backend."""
        return 1

    @property
    def device_name(self) -> str:
        """The device's name as its driver or the system tells it."""
        return cpu_name()

    @property
    def memory_bytes(self) -> int:
        """The device's memory."""
        return physical_memory_bytes()

    @property
    def available_memory_bytes(self) -> int:
        """What of it a new tensor may take."""
        return available_memory_bytes()

    def tune_process(self) -> None:
        """Set what makes this whole process faster on the device; for programs, not for a library's caller."""
        keep_freed_memory()

    def release_memory(self) -> None:
        """Give freed memory back, so that `available_memory_bytes` counts it."""
        release_freed_memory()

    def peak_tensor_bytes(self, *, reset: bool = False) -> int | None:
        """The most bytes of live tensors since the last reset, which may be now; None where nobody counts them."""
        return None

    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    def why_no_graphs(self) -> str | None:
        """Why work cannot be captured once and replayed as a graph; None where it can."""
        return "a CPU has no graphs to replay"

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """Generation of an NVIDIA GPU, such as (9, 0); None for other devices."""
        return None

    @property
    def num_multiprocessors(self) -> int:
        """Multiprocessors of an NVIDIA GPU; 1 for other devices."""
        return 1

    def is_capturing(self) -> bool:
        """Whether queued work is being captured into a graph instead of run."""
        return False

    def as_current(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which this is the device that kernels, streams and events mean where they name none."""
        return contextlib.nullcontext()

    def start_timer(self) -> "WallTimer | StreamTimer":
        """Begin to time the work that is queued from now on."""
        return WallTimer()

    def submit_copy(self, copy: Callable[[], None]) -> Event:
        """Run tensor copies beside the compute work, behind what is queued of either; return their end."""
        copy()
        return Event()

    def device_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed memory of the device, for a large pool that lives long."""
        return zeros_in_huge_pages(shape, dtype)

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed memory of the host that copies to and from the device are fastest with."""
        return zeros_in_huge_pages(shape, dtype)


def zeros_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in host memory that is backed by huge pages where the system has them.

    A large pool is touched a little at a time: with small pages the first touch costs more than the
    copy itself, and later ones miss the table of address translations.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.zeros(*shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes)
    with contextlib.suppress(AttributeError, OSError):  # not on every system
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


class StreamEvent(Event):
    """A moment in a device stream, recorded with the device module's own event."""

    def __init__(self, event: Any, device_module: Any) -> None:
        self._event, self._module = event, device_module

    def wait(self) -> None:
        """See `Event`."""
        self._module.current_stream().wait_event(self._event)

    def synchronize(self) -> None:
        """See `Event`."""
        self._event.synchronize()


class StreamBackend(Backend):
    """What devices with streams share; torch.cuda and torch.npu have the same functions for it."""

    default_dtype = "bf16"
    cache_memory_share = 0.5

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self._copy_stream: Any = None

    @classmethod
    def module(cls) -> Any:
        """The module of torch that drives this kind of device."""
        raise TypeError(f"{cls.__name__} names no device module")

    @classmethod
    def device_count(cls) -> int:
        """See `Backend`."""
        return cls.module().device_count()

    @property
    def device_name(self) -> str:
        """See `Backend`."""
        return self.module().get_device_name(self.device.index)

    @property
    def memory_bytes(self) -> int:
        """See `Backend`."""
        return self.module().get_device_properties(self.device.index).total_memory

    @property
    def available_memory_bytes(self) -> int:
        """See `Backend`."""
        return self.module().mem_get_info(self.device.index)[0]

    def tune_process(self) -> None:
        """See `Backend`: this is the device that streams and events mean where they name none."""
        self.module().set_device(self.device.index)

    def as_current(self) -> contextlib.AbstractContextManager[Any]:
        """See `Backend`."""
        return self.module().device(self.device)

    def release_memory(self) -> None:
        """See `Backend`."""
        self.module().empty_cache()

    def peak_tensor_bytes(self, *, reset: bool = False) -> int:
        """See `Backend`."""
        if reset:
            self.module().reset_peak_memory_stats(self.device.index)
        return self.module().max_memory_allocated(self.device.index)

    def synchronize(self) -> None:
        """See `Backend`."""
        self.module().synchronize(self.device.index)

    def why_no_graphs(self) -> str | None:
        """See `Backend`."""
        return f"no graph runner for {self.type} in this version"

    def start_timer(self) -> StreamTimer:
        """See `Backend`: device events."""
        return StreamTimer(self.module())

    def submit_copy(self, copy: Callable[[], None]) -> Event:
        """See `Backend`: the copies run on one side stream, in order."""
        module = self.module()
        if self._copy_stream is None:
            self._copy_stream = module.Stream(device=self.device)
        self._copy_stream.wait_stream(module.current_stream(self.device))
        with module.stream(self._copy_stream):
            copy()
            event = module.Event()
            event.record(self._copy_stream)
        return StreamEvent(event, module)

    def device_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Backend`."""
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Backend`: pinned memory."""
        return torch.zeros(*shape, dtype=dtype, pin_memory=True)


class CudaBackend(StreamBackend):
    """An NVIDIA GPU."""

    type = "cuda"

    @classmethod
    def module(cls) -> Any:
        """See `StreamBackend`."""
        return torch.cuda

    @classmethod
    def why_unavailable(cls) -> str | None:
        """See `Backend`."""
        if torch.version.cuda is None:
            return "this torch is built without CUDA; install one that is (pip install torch, on Linux)."
        if not torch.cuda.is_available():
            return "torch finds no NVIDIA GPU; check that nvidia-smi lists one and that its driver is recent enough."
        return None

    @property
    def compute_capability(self) -> tuple[int, int]:
        """See `Backend`."""
        return torch.cuda.get_device_capability(self.device)

    @property
    def num_multiprocessors(self) -> int:
        """See `Backend`."""
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def is_capturing(self) -> bool:
        """See `Backend`."""
        return torch.cuda.is_current_stream_capturing()


class NpuBackend(StreamBackend):
    """An Ascend NPU, through torch_npu."""

    type = "npu"

    @classmethod
    def module(cls) -> Any:
        """See `StreamBackend`."""
        return torch.npu

    @classmethod
    def why_unavailable(cls) -> str | None:
        """See `Backend`."""
        try:
            importlib.import_module("torch_npu")  # registers torch.npu
        except ModuleNotFoundError:
            return "torch_npu is not installed; install Ascend's CANN toolkit, then pip install 'hstu[npu]'."
        except (ImportError, OSError) as error:
            return f"torch_npu does not load ({error}); source CANN's set_env.sh first."
        if not torch.npu.is_available():
            return "torch_npu finds no NPU; check that npu-smi info lists one."
        return None


BACKENDS: tuple[type[Backend], ...] = (CudaBackend, NpuBackend, Backend)
"""In the order in which `auto` prefers them."""


@functools.cache
def backend_of(device: torch.device) -> Backend:
    """The backend of a tensor's device; KeyError for a kind of device that none of them drives."""
    return {kind.type: kind for kind in BACKENDS}[device.type](device.index or 0)


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """A resolved `--device`: the backend, the preset that was named, and a warning where it is absent."""

    requested: str
    backend: Backend
    preset: HardwarePreset | None = None
    warning: str | None = None


def open_device(requested: str, *, require: bool = False) -> DeviceChoice:
    """Resolve `auto`, `cpu`, `cuda[:N]`, `npu[:N]` or a hardware preset.

    require: a preset must be this very GPU. UsageError for an unknown name, UnavailableError for an absent device.
    """
    kind, _, index = requested.lower().partition(":")
    if kind in HARDWARE_PRESETS and not index:
        return _open_preset(requested, HARDWARE_PRESETS[kind], require)
    if kind == "auto" and not index:
        return DeviceChoice(requested, next(b for b in BACKENDS if b.why_unavailable() is None)())
    by_type = {backend.type: backend for backend in BACKENDS}
    if kind not in by_type or (index and (kind == "cpu" or not index.isdecimal())):
        names = ("auto", "cpu", "cuda[:N]", "npu[:N]", *HARDWARE_PRESETS)
        raise UsageError(f"There is no device {requested!r}; choose from {', '.join(names)}.")
    backend = by_type[kind]
    if (reason := backend.why_unavailable()) is not None:
        raise UnavailableError(f"--device {requested}: {reason}")
    if (number := int(index or 0)) >= backend.device_count():
        raise UnavailableError(f"--device {requested}: there are only {backend.device_count()} {kind} devices.")
    return DeviceChoice(requested, backend(number))


def resolve_dtype(name: str, backend: Backend) -> str:
    """The dtype's name that `auto` or `--dtype` stands for on this backend; UsageError if unknown."""
    if name == "auto":
        return backend.default_dtype
    if name not in DTYPES:
        raise UsageError(f"There is no dtype {name!r}; choose from auto, {', '.join(DTYPES)}.")
    return name


def _open_preset(requested: str, preset: HardwarePreset, require: bool) -> DeviceChoice:
    """The GPU of this name if there is one, else the best backend here with a warning."""
    if CudaBackend.why_unavailable() is None:
        for number in range(CudaBackend.device_count()):
            backend = CudaBackend(number)
            if preset.matches(backend.device_name):
                return DeviceChoice(requested, backend, preset)
    if require:
        raise UnavailableError(f"--require-device: this machine has no {requested.upper()}.")
    best = open_device("auto").backend
    warning = f"This machine has no {requested.upper()}: running on {best.device_name}, and reported as such."
    return DeviceChoice(requested, best, preset, warning)
