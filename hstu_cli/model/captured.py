"""The block over cached steps as captured graphs: what all ways to choose the captured sizes have in common."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from hstu_cli.backend import BROKEN, Graph, GraphPool, packed
from hstu_cli.errors import HstuError, RunError, UnavailableError
from hstu_cli.kvcache import KVCacheManager
from hstu_cli.kvcache.batch import PagedAttention
from hstu_cli.model.layer import Attention, HSTUBlock

# Shapes: n tokens of a batch, D hidden_dim.

Size = TypeVar("Size", bound=Hashable)


class CaptureFailedError(RunError):
    """The device refused to capture a step."""


class CapturedBlock(ABC, Generic[Size]):
    """The block over a KV cache, from graphs where a step has a size that was captured, else as ever.

    A graph repeats the same operations on the same memory. So a step is written into buffers that live as long as the
    graph, and padded to its size; what rows of padding append goes to slots that no user has. With a host tier there is
    a graph for each layer, and the copies of a layer's pages are waited for between two of them; without one there is a
    single graph.
    """

    learns_sizes = False
    """Whether sizes are captured when steps have had them, by `capture_pending`, and not ahead by `capture`."""

    def __init__(self, layers: HSTUBlock, cache: KVCacheManager, impl: str, most_tokens: int) -> None:
        """Nothing is captured yet. most_tokens: no captured step has more, padding included."""
        self.layers, self.cache, self.impl = layers, cache, impl
        self.config, self.storage = cache.model, cache.device_storage
        self.is_layerwise = cache.host is not None
        self.left_out: list[Size] = []
        self.replays = 0
        self.eager_steps = 0
        self.capture_ms = 0.0
        self._captured: dict[Size, list[Graph]] = {}  # a graph for each layer, or one for all
        self._weights: list[tuple[torch.nn.Module, str, int]] = []
        self._pool: GraphPool | None = None
        pages = self.storage.pages
        self._x = torch.zeros(most_tokens, self.config.hidden_dim, dtype=pages.dtype, device=pages.device)
        slots = cache.spare_slots
        self._padding_slots = torch.arange(most_tokens) % len(slots) + slots.start

    @abstractmethod
    def sizes_to_capture(self) -> Sequence[Size]:
        """What `capture` captures, in this order."""

    @abstractmethod
    def size_for(self, attention: PagedAttention) -> Size | None:
        """The captured size in which a step runs; None for one that runs without a graph."""

    @abstractmethod
    def input_of(self, size: Size) -> torch.Tensor:
        """Where a size's graphs read the token embeddings, and write their result: the first rows of a buffer."""

    @abstractmethod
    def static_attention(self, size: Size) -> Attention:
        """The attention of a size's captured batch, which is on the device alone."""

    @abstractmethod
    def load_full_step(self, size: Size) -> None:
        """Fill the buffers with a step as heavy as the size allows, which stores nothing that anybody reads."""

    @abstractmethod
    def load(self, size: Size, x: torch.Tensor, attention: PagedAttention) -> None:
        """Write a step into the buffers, padded to its size, in copies for which nobody waits."""

    @abstractmethod
    def described(self, size: Size) -> dict[str, int]:
        """A size, as the JSON record names it."""

    @torch.no_grad()
    def capture(self, on_size: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Capture everything anew.

        A size for which memory does not suffice is left out, and its steps run in a larger one or without a graph.
        on_size: called with the sizes that are done and all of them. CaptureFailedError where the device refuses.
        """
        start = time.perf_counter()
        sizes = list(self.sizes_to_capture())
        self._captured, self.left_out, self._weights, self._pool = {}, [], [], None
        self._capture_each(sizes, on_size)
        self.capture_ms = (time.perf_counter() - start) * 1e3

    def capture_pending(self) -> None:
        """Capture what was put off until no step is under way; nothing where all is captured ahead.

        CaptureFailedError where the device refuses.
        """

    @torch.no_grad()
    def run(self, x: torch.Tensor, attention: PagedAttention) -> torch.Tensor:
        """The block's output [n, D] for the token embeddings x [n, D] of a step; its attention is on the host.

        A result from a graph is overwritten by the next run. ValueError for an x that the graphs cannot read.
        """
        if x.shape[1:] != self._x.shape[1:] or x.dtype != self._x.dtype or x.device != self._x.device:
            raise ValueError(
                f"x must be [tokens, {self._x.shape[1]}] {self._x.dtype} on {self._x.device}, "
                f"not {list(x.shape)} {x.dtype} on {x.device}"
            )
        size = self.size_for(attention)
        if size is not None and self._weights_were_replaced():
            self.capture()  # the graphs would go on reading the old ones
            size = self.size_for(attention)
        if size is None:
            self.eager_steps += 1
            self._note_eager_step(attention)
            return self.layers(x, attention.to(x.device))
        self.load(size, x, attention)
        for layer, graph in enumerate(self._captured[size]):
            for job in attention.jobs:
                if self.is_layerwise:
                    job.wait_layer(layer)
                else:
                    job.wait()
            graph.replay()
        self.replays += 1
        return self.input_of(size)[: x.shape[0]]

    def forget_counts(self) -> None:
        """Count steps anew, as after a rehearsal."""
        self.replays = self.eager_steps = 0

    def summary(self) -> dict[str, Any]:
        """What was captured and replayed, named as in the JSON record."""
        return {
            "buckets": [self.described(size) for size in sorted(self._captured)],
            "left_out": [self.described(size) for size in sorted(self.left_out)],
            "layerwise": self.is_layerwise,
            "captured_graphs": sum(map(len, self._captured.values())),
            "capture_ms": self.capture_ms,
            "memory_bytes": self.buffer_bytes() + (self._pool.memory_bytes if self._pool else 0),
            "replays": self.replays,
            "eager_steps": self.eager_steps,
        }

    def buffer_bytes(self) -> int:
        """Of the memory that graphs read, weights and pages aside."""
        return self._x.nbytes

    def _note_eager_step(self, attention: PagedAttention) -> None:
        """A step ran without a graph."""

    def _weights_were_replaced(self) -> bool:
        return any(getattr(module, name).data_ptr() != address for module, name, address in self._weights)

    def _capture_each(self, sizes: Sequence[Size], on_size: Callable[[int, int], None]) -> None:
        """Capture these sizes besides those that are there.

        CaptureFailedError where the device refuses, for another reason than its memory.
        """
        with self._refusal_told():
            if self._pool is None:
                self._pool = self.cache.backend.graph_pool()
        if not self._weights:
            self._weights = [
                (module, name, weight.data_ptr())
                for module in self.layers.modules()
                for name, weight in module.named_parameters(recurse=False)
            ]
        for done, size in enumerate(sizes):
            on_size(done, len(sizes))
            with self._refusal_told():
                if done == 0 or not self.learns_sizes:  # ahead of all steps, what that costs does not matter
                    self._pool.begin_round()
                graphs = self._capture_if_it_fits(size)
                if graphs is None:
                    self.left_out.append(size)
                    self._pool.release()  # of the graphs of layers that came before the one for which memory ran out
                else:
                    self._captured[size] = graphs
        on_size(len(sizes), len(sizes))
        with self._refusal_told():
            self.cache.backend.synchronize()

    @contextlib.contextmanager
    def _refusal_told(self) -> Iterator[None]:
        """Tell in one message what breaks a capture, be it in the device or in its Python module."""
        try:
            yield
        except BROKEN as error:
            if isinstance(error, HstuError):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise CaptureFailedError(
                f"{self.cache.backend.device_name} captures no graph of a step: {reason}; run without graphs."
            ) from error

    def _capture_if_it_fits(self, size: Size) -> list[Graph] | None:
        """The graphs of a size, or None where memory does not suffice."""
        layers = list(enumerate(self.layers))
        parts = [[layer] for layer in layers] if self.is_layerwise else [layers]
        try:
            x, attention = self.input_of(size), self.static_attention(size)
            self.load_full_step(size)
            return [self._pool.capture(partial(self._work, part, x, attention)) for part in parts]
        except (RuntimeError, UnavailableError) as error:  # the latter where no configuration of a kernel had room
            if "out of memory" not in str(error).lower():
                raise
            return None

    def _work(self, part: Sequence[tuple[int, torch.nn.Module]], x: torch.Tensor, attention: Attention) -> None:
        """What a graph does: some layers, from x to x."""
        hidden = x
        for index, layer in part:
            hidden = layer(hidden, attention, index)
        x.copy_(hidden)


def upload_packed(buffer: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Copy host tensors into a buffer of the device, each to its place; nobody waits."""
    host, _ = packed(parts, buffer.device)
    buffer[: len(host)].copy_(host, non_blocking=True)


def packed_length(parts: Sequence[torch.Tensor]) -> int:
    """Of the buffer in which these lie at aligned places."""
    return len(packed(parts, torch.device("cpu"))[0])


def packed_places(parts: Sequence[torch.Tensor]) -> list[slice]:
    """Where they lie there."""
    return packed(parts, torch.device("cpu"))[1]
