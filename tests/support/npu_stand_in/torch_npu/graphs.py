"""Graphs of the stand-in device: what is captured is not computed, and a replay does it on the same memory.

A graph's memory is its pool's: what one leaves there is poisoned when another of the pool, or it itself, replays.
"""

import os
import weakref
from collections.abc import Callable

import torch

from torch_npu import device, memory
from torch_npu.recorder import RECORDER, CaptureError

current: "NPUGraph | None" = None
"""The graph that is captured now."""

_pools: dict[int, "weakref.WeakSet[NPUGraph]"] = {}


def graph_pool_handle() -> int:
    """A pool that graphs may share."""
    _pools[len(_pools)] = weakref.WeakSet()
    return len(_pools) - 1


class NPUGraph:
    """Work on fixed memory, captured in a side stream."""

    num_captured = 0

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []
        self._memory: list[torch.Tensor] = []  # bytes that were allocated while it was captured
        self._stream: device.Stream | None = None
        self._pool: weakref.WeakSet[NPUGraph] = weakref.WeakSet()
        self._is_whole = False

    def capture_begin(self, pool: int | None = None, capture_error_mode: str = "global") -> None:
        """From now on the current stream's work is recorded, and nothing else may be done."""
        global current
        if os.environ.get("TASK_QUEUE_ENABLE") == "2":
            raise RuntimeError("TASK_QUEUE_ENABLE=2 while a graph is captured")
        if device.STATE.current.default:
            raise CaptureError("a capture on the default stream")
        if current is not None or self._stream is not None:
            raise CaptureError("a capture within another, or a second one into a graph")
        if any(stream.queued for stream in device.STATE.streams):
            raise CaptureError("a capture while the device is busy")
        current, self._stream = self, device.STATE.current
        RECORDER.capturing = True
        self._pool = _pools[pool] if pool is not None else self._pool
        self._pool.add(self)

    def capture_end(self) -> None:
        """The graph is whole."""
        global current
        if current is not self:
            raise CaptureError("the end of a capture that was not begun")
        current, RECORDER.capturing = None, False
        self._is_whole = True
        NPUGraph.num_captured += 1

    def add(self, work: Callable[[], None]) -> None:
        """Do this at each replay; it was put to the current stream."""
        if device.STATE.current is not self._stream:
            raise CaptureError("work on another stream while a graph is captured")
        self._work.append(work)

    def allocated(self, content: torch.Tensor) -> None:
        """Fresh bytes of the device that belong to this graph."""
        self._memory.append(content)

    def replay(self) -> None:
        """Do the work, behind what is queued on the current stream."""
        RECORDER.refuse_in_capture("a replay")
        if not self._is_whole:
            raise CaptureError("a replay of a graph that was not captured")
        if device.STATE.current.default:
            self._perform()
        else:
            device.STATE.current.submit(self._perform)

    def _perform(self) -> None:
        for graph in self._pool:
            for content in graph._memory:
                memory.as_cpu(content).fill_(memory.POISON)
        for work in self._work:
            work()
