"""Bytes of live tensors as they come and go: what a pass of a model takes beside what was there before."""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTimeline(TorchDispatchMode):
    """Within this context, counts the memory of every tensor that an operation makes until nobody holds it any more.

    Memory counts once, however many tensors view it, and not at all where it was there before. What an operation takes
    and frees by itself, such as a library's work space, is not seen.
    points: milliseconds since the beginning and bytes alive, at the beginning and after each change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.points: list[tuple[float, int]] = [(0.0, 0)]
        self._start = time.perf_counter()
        self._seen: dict[int, weakref.ref] = {}  # storages by id, for as long as they live

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, was_there=True)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._see(tensor, was_there=False)
        return result

    @property
    def now_ms(self) -> float:
        """Milliseconds since the beginning."""
        return (time.perf_counter() - self._start) * 1e3

    def _see(self, tensor: torch.Tensor, *, was_there: bool) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = id(storage), 0 if was_there else storage.nbytes()
        if key in self._seen:
            return

        def gone(_: weakref.ref) -> None:
            del self._seen[key]
            self._change(-num_bytes)

        self._seen[key] = weakref.ref(storage, gone)
        self._change(num_bytes)

    def _change(self, num_bytes: int) -> None:
        if num_bytes:
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self.points.append((self.now_ms, self.live_bytes))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
