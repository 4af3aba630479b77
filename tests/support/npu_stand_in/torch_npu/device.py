"""`torch.npu` of the stand-in: one device whose side streams do their copies as late as the events allow.

Work on the default stream runs at once, that on a side stream only when somebody waits for it. So who forgets to wait
reads old bytes, and who overwrites too early has the new ones copied: wrong scores instead of a rare race. Pinned
memory that goes to the device on the default stream is looked at again when the host has waited.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import backend_registration

from torch_npu import memory, operators
from torch_npu.recorder import RECORDER


class Stream:
    """A queue of work; in the default one are copies to the host alone, since all else happens there at once."""

    def __init__(self, device: object = None, priority: int = 0, *, default: bool = False) -> None:
        self.default = default
        self.seen = 0  # operators of the default stream that this one comes behind
        self._queue: list[Callable[[], None]] = []
        self._checks: list[tuple[int, Callable[[], None]]] = []  # each behind so many pieces of work
        self.performed = 0

    @property
    def queued(self) -> bool:
        """Whether work is left to do."""
        return bool(self._queue)

    @property
    def submitted(self) -> int:
        """Pieces of work put here so far."""
        return self.performed + len(self._queue)

    def submit(self, work: Callable[[], object]) -> None:
        """Do this when somebody waits for it."""
        self._queue.append(work)

    def check_when_passed(self, check: Callable[[], None]) -> None:
        """Do this when the host knows that all that is here by now is done."""
        self.submit(lambda: None)
        self._checks.append((self.submitted, check))

    def passed(self, number: int | None = None) -> None:
        """The host has waited for the work up to number `number`, or for all."""
        number = self.submitted if number is None else number
        self.perform_up_to(number)
        while self._checks and self._checks[0][0] <= number:
            self._checks.pop(0)[1]()

    def perform_up_to(self, number: int) -> None:
        """Do the work up to number `number`."""
        while self.performed < number:
            self._queue.pop(0)()
            self.performed += 1

    def finish(self) -> None:
        """Do all that is queued."""
        self.perform_up_to(self.submitted)

    def wait_stream(self, other: "Stream") -> None:
        """Come behind what is queued in the other stream."""
        RECORDER.refuse_in_capture("a stream that waits for another")
        other.finish()
        if other.default:
            self.seen = operators.num_done()

    def wait_event(self, event: "Event") -> None:
        """Come behind an event."""
        event.wait(self)

    def record_event(self, event: "Event | None" = None) -> "Event":
        """An event at the end of the queue."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Block the host until all is done."""
        RECORDER.sync("stream.synchronize")
        self.passed()


class Event:
    """A moment in a stream."""

    def __init__(self, enable_timing: bool = False, **_: object) -> None:
        self._timing = enable_timing
        self._stream: Stream | None = None
        self._number = self._seen = 0
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Be now, in this stream or the current one."""
        self._stream = stream or STATE.current
        self._number, self._seen = self._stream.submitted, operators.num_done()
        self._time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Make a stream, or the current one, come behind this."""
        RECORDER.refuse_in_capture("a stream that waits for an event")
        if self._stream is None:
            raise RuntimeError("this event was never recorded")
        self._stream.perform_up_to(self._number)
        if self._stream.default:
            (stream or STATE.current).seen = self._seen

    def synchronize(self) -> None:
        """Block the host until this has passed."""
        RECORDER.sync("event.synchronize")
        self.wait()
        self._stream.passed(self._number)

    def query(self) -> bool:
        """Whether it has passed."""
        RECORDER.refuse_in_capture("a question to an event")
        return self._stream is None or self._stream.performed >= self._number

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds between two events that time."""
        if not (self._timing and end._timing):
            raise RuntimeError("both events need enable_timing=True")
        return (end._time - self._time) * 1e3


@dataclass
class _State:
    default: Stream
    current: Stream
    streams: list[Stream]


_DEFAULT = Stream(default=True)
STATE = _State(_DEFAULT, _DEFAULT, [])


@dataclass(frozen=True)
class _Properties:
    name: str = "Ascend910B-stand-in"
    total_memory: int = memory.CAPACITY_BYTES


class NpuModule:
    """What `torch.npu` is."""

    Event = Event
    jit_compile = True

    def offer_graphs(self, wanted: bool) -> None:
        """Have graphs, as a newer torch_npu has, or lack them."""
        from torch_npu import graphs

        offered = {"NPUGraph": graphs.NPUGraph, "graph_pool_handle": graphs.graph_pool_handle}
        offered["is_current_stream_capturing"] = self._is_capturing
        for name, value in offered.items():
            self.__dict__.pop(name, None)
            if wanted:
                setattr(self, name, value)

    def _is_capturing(self) -> bool:
        return RECORDER.capturing

    def set_compile_mode(self, *, jit_compile: bool) -> None:
        self.jit_compile = jit_compile

    def Stream(self, device: object = None, priority: int = 0) -> Stream:  # noqa: N802 - the name that torch uses
        stream = Stream(device, priority)
        STATE.streams.append(stream)
        return stream

    def is_available(self) -> bool:
        return self.device_count() > 0

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, index: Any) -> None:
        if torch.device("npu", index if isinstance(index, int) else index.index).index != 0:
            raise RuntimeError("there is one npu")

    @contextlib.contextmanager
    def device(self, index: Any) -> Iterator[None]:
        self.set_device(index)
        yield

    def get_device_name(self, index: Any = 0) -> str:
        return _Properties().name

    def get_device_properties(self, index: Any = 0) -> _Properties:
        return _Properties()

    def mem_get_info(self, index: Any = 0) -> tuple[int, int]:
        return memory.CAPACITY_BYTES - memory.used_bytes(), memory.CAPACITY_BYTES

    def memory_reserved(self, index: Any = 0) -> int:
        return memory.used_bytes()

    def empty_cache(self) -> None:
        RECORDER.refuse_in_capture("giving memory back")

    def reset_peak_memory_stats(self, index: Any = None) -> None:
        memory.reset_peak()

    def max_memory_allocated(self, index: Any = None) -> int:
        return memory.peak_bytes()

    def synchronize(self, index: Any = None) -> None:
        RECORDER.sync("synchronize")
        self.finish()

    def finish(self) -> None:
        """What `synchronize` waits for, without counting a wait."""
        for stream in (STATE.default, *STATE.streams):
            stream.passed()

    def current_stream(self, device: Any = None) -> Stream:
        return STATE.current

    def default_stream(self, device: Any = None) -> Stream:
        return STATE.default

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, STATE.current = STATE.current, stream
        try:
            yield
        finally:
            STATE.current = before

    def is_initialized(self) -> bool:
        return True

    def _lazy_init(self) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def register() -> None:
    """Take torch's PrivateUse1 slot as `npu`, with this module as `torch.npu`."""
    backend_registration._setup_privateuseone_for_python_backend("npu", NpuModule())
