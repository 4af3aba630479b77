"""What a device offers the rest of the package, and the plainest one: a CPU."""

import contextlib
import math
import mmap
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from hstu_cli.errors import UnavailableError
from hstu_cli.hardware import (
    available_memory_bytes,
    cpu_name,
    keep_freed_memory,
    physical_memory_bytes,
    release_freed_memory,
)
from hstu_cli.timing import Timer

ALIGNMENT_BYTES = 64
"""Where each of several tensors in one buffer may begin: for pointers less aligned kernels are compiled anew."""

PINNED_FOR = ("cuda", "npu")
"""Devices that copy from pinned memory while this thread goes on."""

BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a device's Python module raises that does not fit its machine, or has other functions than are known here."""

Memory = TypeVar("Memory", bound=mmap.mmap)


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


class Graph(Protocol):
    """Work on fixed memory that was captured once."""

    def replay(self) -> None:
        """Queue the work again: it reads and writes the same memory as when it was captured."""
        ...


class GraphPool(Protocol):
    """Captures graphs that share memory for their intermediates: what one leaves there is gone when another replays.

    memory_bytes: what it holds of the device's memory for the graphs that are kept; after one was dropped, `release`
    makes that true again.
    """

    memory_bytes: int

    def capture(self, work: Callable[[], object]) -> Graph:
        """Do the work once to load and tune what it needs, then capture it without doing it.

        It must queue the same operations on the same memory each time, and wait for nothing. Raises what the work
        raises, running out of memory included; the graphs that were captured before stay as they are.
        """
        ...

    def begin_round(self) -> None:
        """Captures follow: before the first of them the device's memory that nobody uses is given back, for graphs."""
        ...

    def release(self) -> None:
        """Give memory back that only dropped graphs, or captures that failed, have used."""
        ...


class Backend:
    """A plain CPU; the accelerators below replace what differs."""

    type = "cpu"
    default_dtype = "fp32"
    cache_memory_share = 0.25
    """Share of the device's memory that a KV cache takes unless its size is given."""
    how_to_list = "there is one CPU"
    """Which command lists the devices, and what hides some, as a clause."""
    has_graphs = False
    """Whether there are devices of this kind that capture graphs; `why_no_graphs` tells of this one."""
    few_shapes = False
    """Whether operators are prepared for each shape anew, so that padding to few of them pays."""
    why_graphs_only_on_request: str | None = None
    """Why work is captured as graphs where that is asked for, and not by default, as a clause; None where it is."""

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

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Releases of what computes on the device, by name: what was measured with others holds no more."""
        return {"torch": torch.__version__}

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

    def graph_pool(self) -> GraphPool:
        """A new pool of graphs; UnavailableError with the reason where there are none."""
        raise UnavailableError(f"no graphs: {self.why_no_graphs()}")

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

    def start_timer(self) -> Timer:
        """Begin to time the work that is queued from now on."""
        return WallTimer()

    def submit_copy(self, copy: Callable[[], None], *, to_host: bool, after: Sequence[Event] = ()) -> Event:
        """Run tensor copies beside the compute work; return their end.

        They come behind what is queued of the compute work and of copies in the same direction, and behind the events
        `after`. Copies to the host and from it run side by side.
        """
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
    return torch.frombuffer(in_huge_pages(mmap.mmap, num_bytes), dtype=dtype).view(*shape)


def in_huge_pages(kind: type[Memory], num_bytes: int) -> Memory:
    """New memory of the process's own, with the wish to back it by huge pages told to a system that has them."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return kind(-1, num_bytes)
    # Memory to share, which is Python's default, gets small pages on most systems.
    memory = kind(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copies on a device of one-dimensional host tensors of one dtype; on a CPU the tensors themselves.

    They go by one transfer from pinned memory, for which nobody waits: neither this thread nor the device.
    """
    if device.type == "cpu":
        return list(tensors)
    host, parts = packed(tensors, device)
    # The allocator of pinned memory gives `host` to nobody else before the copy is over.
    on_device = host.to(device, non_blocking=True)
    return [on_device[part] for part in parts]


def packed(tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, list[slice]]:
    """One host tensor that holds these, each at an aligned place, and their places.

    device: where it will be copied to; memory is pinned where that makes a copy one that nobody waits for.
    """
    dtype = tensors[0].dtype
    step = ALIGNMENT_BYTES // dtype.itemsize
    parts, end = [], 0
    for tensor in tensors:
        parts.append(slice(end, end + len(tensor)))
        end += -(-len(tensor) // step) * step
    host = torch.empty(end, dtype=dtype, pin_memory=device.type in PINNED_FOR)
    for tensor, part in zip(tensors, parts, strict=True):
        host[part] = tensor
    return host, parts
