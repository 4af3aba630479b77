"""Backends: what is asked of a device's torch module for graphs and uploads, and what is said where it lacks them."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hstu_cli.backend import Backend, CudaBackend, upload
from hstu_cli.backend.base import ALIGNMENT_BYTES, packed
from hstu_cli.backend.streams import StreamBackend
from hstu_cli.errors import UnavailableError


class StandInModule:
    """Functions of torch.cuda and torch.npu that graphs need, which note their calls and count memory.

    It shows the order of the calls alone; real graphs are captured by the tests marked `gpu`.
    """

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.streams: list[StandInStream] = []
        self.reserved = 100
        self.pool_bytes = 0
        self.live_graphs: weakref.WeakSet[StandInGraph] = weakref.WeakSet()
        self.stream_name = "compute"
        self.capturing = False

    def graph_pool_handle(self) -> str:
        return "pool"

    def current_stream(self, device: object = None) -> str:
        return self.stream_name

    def Stream(self, device: torch.device) -> "StandInStream":  # noqa: N802 as torch calls it
        return StandInStream(self)

    def Event(self) -> "StandInEvent":  # noqa: N802 as torch calls it
        return StandInEvent()

    @contextmanager
    def stream(self, stream: "StandInStream") -> Iterator[None]:
        before, self.stream_name = self.stream_name, "side"
        try:
            yield
        finally:
            self.stream_name = before

    def synchronize(self, index: int) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.calls.append("empty cache")
        self.reserved -= self.reserved % 100  # what the warm-up left
        if not self.live_graphs:  # which share the pool's memory: it goes with the last of them
            self.pool_bytes = 0

    def memory_reserved(self, index: int) -> int:
        return self.reserved + self.pool_bytes

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def CUDAGraph(self) -> "StandInGraph":  # noqa: N802 as torch calls it
        return StandInGraph(self)


class StandInStream:
    def __init__(self, module: StandInModule) -> None:
        self.module = module
        self.name = f"stream {len(module.streams)}"
        module.streams.append(self)

    def wait_stream(self, stream: str) -> None:
        self.module.calls.append(f"side waits for {stream}")

    def wait_event(self, event: "StandInEvent") -> None:
        self.module.calls.append(f"{self.name} waits for {event.name}")


class StandInEvent:
    name = "an event that nobody recorded"

    def record(self, stream: StandInStream) -> None:
        self.name = f"copy {len(stream.module.calls)}"
        stream.module.calls.append(f"{self.name} ends in {stream.name}")


class StandInGraph:
    def __init__(self, module: StandInModule) -> None:
        self.module = module
        module.live_graphs.add(self)

    def capture_begin(self, pool: str) -> None:
        assert self.module.stream_name == "side"
        self.module.capturing = True
        self.module.calls.append(f"begin in {pool}")

    def capture_end(self) -> None:
        assert self.module.stream_name == "side"
        self.module.capturing = False
        self.module.calls.append("end")
        if "break" in self.module.calls:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.module.calls.append("replay")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> StandInModule:
    module = StandInModule()
    monkeypatch.setattr(CudaBackend, "module", classmethod(lambda cls: module))
    return module


def work(module: StandInModule, grows: int) -> Callable[[], None]:
    """Work that takes memory: some while it warms up, as much as it says while it is captured."""

    def run() -> None:
        if module.capturing:
            module.pool_bytes += grows
        else:
            module.reserved += 7
        module.calls.append(f"{'captured' if module.capturing else 'done'} in {module.stream_name}")

    return run


def test_work_warms_up_and_is_captured_in_a_side_stream(module: StandInModule) -> None:
    backend = CudaBackend()
    pool = backend.graph_pool()
    graph = pool.capture(work(module, 500))
    assert module.calls == [
        "side waits for compute", "done in side", "synchronize", "empty cache", "begin in pool", "captured in side",
        "end",
    ]  # fmt: skip
    assert pool.memory_bytes == 500
    module.calls.clear()
    pool.capture(work(module, 0))
    assert pool.memory_bytes == 500, "the second graph uses the memory of the first"
    assert "synchronize" in module.calls
    assert "empty cache" not in module.calls, "memory is given back once a round"
    pool.begin_round()
    pool.capture(work(module, 100))
    assert module.calls.count("empty cache") == 1
    assert pool.memory_bytes == 600
    graph.replay()
    assert module.calls[-1] == "replay"
    assert module.stream_name == "compute"


def test_a_capture_that_fails_ends_and_leaves_the_stream(module: StandInModule) -> None:
    """The error that is told is the one of the work, not what ending a broken capture says."""
    pool = CudaBackend().graph_pool()

    def fails() -> None:
        if module.capturing:
            module.calls.append("break")
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        pool.capture(fails)
    assert module.calls[-1] == "end"
    assert module.stream_name == "compute"
    assert not module.capturing
    module.calls.clear()
    pool.capture(work(module, 100)).replay()
    assert pool.memory_bytes == 100


def test_memory_of_dropped_graphs_is_given_back_and_not_counted(module: StandInModule) -> None:
    """It stays in the pool while another graph of the pool is there, whose captures go on using it."""
    pool = CudaBackend().graph_pool()
    first, second = pool.capture(work(module, 500)), pool.capture(work(module, 300))
    assert pool.memory_bytes == 800
    del second
    pool.release()
    assert pool.memory_bytes == 800
    del first
    pool.release()
    assert pool.memory_bytes == 0
    kept = pool.capture(work(module, 200))
    assert pool.memory_bytes == 200

    def fails() -> None:
        work(module, 400)()
        if module.capturing:
            module.calls.append("break")
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        pool.capture(fails)
    pool.release()
    assert pool.memory_bytes == 600, "what a capture took before it failed is in the pool"
    module.calls.clear()
    del kept
    pool.release()
    assert pool.memory_bytes == 0


def test_copies_have_a_stream_for_each_direction_and_wait_for_what_they_are_told(module: StandInModule) -> None:
    backend = CudaBackend()
    copied: list[str] = []

    def copy() -> None:
        copied.append(module.stream_name)

    first = backend.submit_copy(copy, to_host=True)
    backend.submit_copy(copy, to_host=False, after=[first])
    backend.submit_copy(copy, to_host=True)
    assert module.calls == [
        "side waits for compute", "copy 1 ends in stream 0",
        "side waits for compute", "stream 1 waits for copy 1", "copy 4 ends in stream 1",
        "side waits for compute", "copy 6 ends in stream 0",
    ]  # fmt: skip
    assert copied == ["side"] * 3
    assert module.stream_name == "compute"


def test_a_device_without_graphs_says_what_is_missing(module: StandInModule, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CudaBackend()
    assert backend.why_no_graphs() is None
    module.capturing = True
    assert backend.is_capturing()
    monkeypatch.delattr(StandInModule, "CUDAGraph")
    assert backend.why_no_graphs() == "this version of torch.cuda has no CUDAGraph"
    assert not backend.is_capturing()
    with pytest.raises(UnavailableError, match="CUDAGraph"):
        backend.graph_pool()
    with pytest.raises(UnavailableError, match="a CPU has no graphs"):
        Backend().graph_pool()
    assert not Backend().is_capturing()


def test_torch_has_what_graphs_of_a_gpu_need() -> None:
    """True without a GPU too: the names are there, whatever the build."""
    assert CudaBackend().why_no_graphs() is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("sizes", [(1, 0, 33, 5), (0,), (16, 16)], ids=str)
def test_packed_tensors_lie_at_aligned_places(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    tensors = [torch.arange(size, dtype=dtype) + 100 * i for i, size in enumerate(sizes)]
    host, parts = packed(tensors, torch.device("cpu"))
    for tensor, part in zip(tensors, parts, strict=True):
        assert torch.equal(host[part], tensor)
        assert part.start * dtype.itemsize % ALIGNMENT_BYTES == 0
    again, _ = packed([torch.zeros(size, dtype=dtype) for size in sizes], torch.device("cpu"))
    assert len(host) == len(again) < sum(sizes) + len(sizes) * ALIGNMENT_BYTES // dtype.itemsize + 1


def test_uploads_to_the_cpu_copy_nothing() -> None:
    tensors = [torch.arange(3), torch.arange(5)]
    assert all(a is b for a, b in zip(upload(tensors, torch.device("cpu")), tensors, strict=True))
    assert [t.shape[0] for t in upload(tensors, torch.device("meta"))] == [3, 5]


class StandInRuntime:
    """Notes what is pinned; `code` is what pinning returns, 0 for success."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.pinned = code, {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802 as CUDA calls it
        assert flags == 1
        if not self.code:
            self.pinned[address] = num_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 as CUDA calls it
        del self.pinned[address]
        return 0


def test_host_memory_is_pinned_as_long_as_a_tensor_uses_it(
    module: StandInModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = StandInRuntime()
    monkeypatch.setattr(module, "cudart", lambda: runtime, raising=False)
    tensor = CudaBackend().host_tensor((3, 5, 7), torch.bfloat16)
    assert tensor.shape == (3, 5, 7)
    assert not tensor.any()
    assert runtime.pinned == {tensor.data_ptr(): 3 * 5 * 7 * 2}
    part = tensor[1].fill_(1)
    del tensor
    assert runtime.pinned
    assert (part == 1).all()
    del part
    assert not runtime.pinned
    assert module.calls == ["synchronize"], "copies are over before memory goes"
    assert CudaBackend().host_tensor((0, 4), torch.float32).shape == (0, 4)


class LastError(TorchDispatchMode):
    """Raises an error at the first kernel, as torch does with what a call before it left in the CUDA runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.pending = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.pending and func.overloadpacket is torch.ops.aten.fill_:
            self.pending = False
            raise torch.AcceleratorError("CUDA error: part or all of the requested memory range is already mapped")
        return func(*args, **(kwargs or {}))


def test_where_the_driver_does_not_pin_torch_does(module: StandInModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cudart", lambda: StandInRuntime(code=2), raising=False)
    asked: list[Sequence[int]] = []
    monkeypatch.setattr(StreamBackend, "host_tensor", lambda self, shape, dtype: asked.append(shape))
    backend = CudaBackend()
    backend.device = torch.device("cpu")
    with LastError() as last_error:
        backend.host_tensor((4,), torch.float32)
        torch.empty(2).fill_(3)  # which would raise what the driver left behind
    assert asked == [(4,)]
    assert not last_error.pending
    assert not module.calls


@pytest.mark.gpu
def test_a_failure_to_pin_reaches_no_kernel_that_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = torch.cuda.cudart()
    codes: list[int] = []

    class Failing:
        def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> Any:  # noqa: N802 as CUDA calls it
            codes.append(int(runtime.cudaHostRegister(address, 0, flags)))  # nothing cannot be pinned
            return codes[-1]

    monkeypatch.setattr(torch.cuda, "cudart", Failing)
    assert CudaBackend().host_tensor((4,), torch.float32).is_pinned()
    assert codes != [0]
    assert (torch.ones(3, device="cuda") + 1).tolist() == [2, 2, 2]


@pytest.mark.gpu
def test_pinned_memory_is_of_the_size_that_was_asked_for() -> None:
    tensor = CudaBackend().host_tensor((3, 1 << 20), torch.float32)
    assert tensor.is_pinned()
    on_device = torch.empty(tensor.shape, device="cuda")
    tensor.normal_()
    on_device.copy_(tensor, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(on_device.cpu(), tensor)
    torch.cuda.synchronize()
    del tensor
    again = CudaBackend().host_tensor((3, 1 << 20), torch.float32)
    assert again.is_pinned()
    assert not again.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_uploads_arrive_though_nobody_waits(dtype: torch.dtype) -> None:
    """Pinned memory is given to the next upload only after the copy from it is over."""
    device = torch.device("cuda", 0)
    found = []
    for i in range(200):
        torch.cuda._sleep(100_000)  # the copies queue up behind it
        found.append(upload([torch.full((1000,), i, dtype=dtype), torch.full((7,), -i, dtype=dtype)], device))
    for i, (first, second) in enumerate(found):
        assert (first == i).all()
        assert (second == -i).all()
