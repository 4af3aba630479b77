"""Devices with streams, whose torch modules have the same functions, and one kind of them: NVIDIA GPUs."""

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hstu_cli.backend.base import Backend, Event, Graph, GraphPool, in_huge_pages
from hstu_cli.errors import UnavailableError


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


class StreamEvent(Event):
    """A moment in a device stream, recorded with the device module's own event."""

    def __init__(self, event: Any, device_module: Any) -> None:
        self.event, self._module = event, device_module

    def wait(self) -> None:
        """See `Event`."""
        self._module.current_stream().wait_event(self.event)

    def synchronize(self) -> None:
        """See `Event`."""
        self.event.synchronize()


class StreamGraph:
    """A graph of the device's own kind, `CUDAGraph` or `NPUGraph`."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def replay(self) -> None:
        """See `Graph`: on the current stream."""
        self._graph.replay()


class StreamGraphPool:
    """Graphs captured in one side stream, which sharing their memory asks for."""

    def __init__(self, device_module: Any, graph_class: Callable[[], Any], device: torch.device) -> None:
        self._module, self._graph_class, self._device = device_module, graph_class, device
        self._handle = device_module.graph_pool_handle()
        self._stream = device_module.Stream(device=device)
        self.memory_bytes = 0
        self._gives_memory_back = True  # before the next capture
        # Of the device's memory that is none of the graphs': with what later work of a round left unused, and without.
        self._bytes_outside = self._bytes_in_use = device_module.memory_reserved(device.index)

    def capture(self, work: Callable[[], object]) -> Graph:
        """See `GraphPool`."""
        module, index = self._module, self._device.index
        self._stream.wait_stream(module.current_stream(self._device))
        with module.stream(self._stream):
            work()
        module.synchronize(index)
        # The graphs get what nobody uses. Once a round, as all work afterwards has to ask the driver for memory anew.
        if self._gives_memory_back:
            module.empty_cache()
            self._gives_memory_back = False
            self._bytes_in_use = module.memory_reserved(index) - self.memory_bytes
        self._bytes_outside = module.memory_reserved(index) - self.memory_bytes
        graph = self._graph_class()
        with module.stream(self._stream):
            graph.capture_begin(pool=self._handle)
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it cannot end well; what broke it is the error to tell
                    graph.capture_end()
                raise
            graph.capture_end()
        self._measure()
        return StreamGraph(graph)

    def begin_round(self) -> None:
        """See `GraphPool`."""
        self._gives_memory_back = True

    def release(self) -> None:
        """See `GraphPool`: the allocator decides what the kept graphs still need."""
        self._module.synchronize(self._device.index)
        self._module.empty_cache()
        self._bytes_outside = self._bytes_in_use
        self._measure()

    def _measure(self) -> None:
        self.memory_bytes = max(0, self._module.memory_reserved(self._device.index) - self._bytes_outside)


class StreamBackend(Backend):
    """What devices with streams share; torch.cuda and torch.npu have the same functions for it."""

    default_dtype = "bf16"
    cache_memory_share = 0.5
    has_graphs = True
    graph_class: str
    """The name of the device module's class of graphs."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self._copy_streams: dict[bool, Any] = {}  # to the host, and from it

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
        """See `Backend`: an old torch_npu lacks them."""
        needed = (self.graph_class, "graph_pool_handle", "is_current_stream_capturing")
        missing = [name for name in needed if not hasattr(self.module(), name)]
        return f"this version of torch.{self.type} has no {', '.join(missing)}" if missing else None

    def graph_pool(self) -> GraphPool:
        """See `Backend`."""
        if reason := self.why_no_graphs():
            raise UnavailableError(f"no graphs: {reason}")
        return StreamGraphPool(self.module(), getattr(self.module(), self.graph_class), self.device)

    def is_capturing(self) -> bool:
        """See `Backend`."""
        return self.why_no_graphs() is None and self.module().is_current_stream_capturing()

    def start_timer(self) -> StreamTimer:
        """See `Backend`: device events."""
        return StreamTimer(self.module())

    def submit_copy(self, copy: Callable[[], None], *, to_host: bool, after: Sequence[StreamEvent] = ()) -> Event:
        """See `Backend`: a side stream for each direction."""
        module = self.module()
        if to_host not in self._copy_streams:
            self._copy_streams[to_host] = module.Stream(device=self.device)
        stream = self._copy_streams[to_host]
        stream.wait_stream(module.current_stream(self.device))
        for event in after:
            stream.wait_event(event.event)
        with module.stream(stream):
            copy()
            event = module.Event()
            event.record(stream)
        return StreamEvent(event, module)

    def device_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Backend`."""
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Backend`: pinned memory."""
        return torch.zeros(*shape, dtype=dtype, pin_memory=True)


HOST_REGISTER_PORTABLE = 1
"""A flag of cudaHostRegister: the memory is pinned for every GPU."""


class PinnedMemory(mmap.mmap):
    """Host memory that a driver keeps in its place until the last tensor on it is gone."""

    unpin: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.unpin is not None:
            self.unpin()


class CudaBackend(StreamBackend):
    """An NVIDIA GPU."""

    type = "cuda"
    graph_class = "CUDAGraph"
    how_to_list = "nvidia-smi -L lists the GPUs of this machine, and CUDA_VISIBLE_DEVICES hides some of them"

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

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Backend`: pinned memory of this very size; torch's own allocator takes the next power of two."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.zeros(*shape, dtype=dtype)
        memory = in_huge_pages(PinnedMemory, num_bytes)
        tensor = torch.frombuffer(memory, dtype=dtype).view(*shape)
        address, runtime = tensor.data_ptr(), self.module().cudart()
        if int(runtime.cudaHostRegister(address, num_bytes, HOST_REGISTER_PORTABLE)):
            self._forget_last_error()
            return super().host_tensor(shape, dtype)

        def unpin() -> None:
            self.synchronize()  # no copy may be under way
            runtime.cudaHostUnregister(address)

        memory.unpin = unpin
        return tensor

    def _forget_last_error(self) -> None:
        """Clear the error that the CUDA runtime keeps of a call of ours that failed.

        torch asks for the last error after each kernel that it launches, whoever's it is: the next kernel of the model
        would raise it. Asking clears it, and not every torch lets Python ask, so a kernel of no use has to.
        """
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device=self.device).fill_(1)  # zeros would be set by a copy engine, without a kernel

    @property
    def compute_capability(self) -> tuple[int, int]:
        """See `Backend`."""
        return torch.cuda.get_device_capability(self.device)

    @property
    def num_multiprocessors(self) -> int:
        """See `Backend`."""
        return torch.cuda.get_device_properties(self.device).multi_processor_count
