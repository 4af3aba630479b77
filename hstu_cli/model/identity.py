"""Tells whether a model still has the weights that cached keys and values were made with."""

import itertools

import torch
from torch import nn

from hstu_cli.kernels.linear.native import forget

_generations = itertools.count()


class WeightsIdentity:
    """Names a model's weights; the name changes whenever a tensor is replaced or written in place.

    It watches the tensors and their version counters, so it costs microseconds and not a pass over
    the weights. A write through `tensor.data`, or to a tensor made in inference mode, does not count as
    one in torch; call `renew` after it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: list[tuple[torch.Tensor, int]] = []
        self.renew()

    def renew(self) -> None:
        """Take the weights for new ones, packed copies of them too."""
        for parameter in self._model.parameters():
            forget(parameter)
        self._name = next(_generations).to_bytes(8, "little")

    def current(self) -> bytes:
        """The name of the weights as they are now."""
        tensors = itertools.chain(self._model.parameters(), self._model.buffers())
        now = [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        same = len(now) == len(self._seen) and all(
            new is old and version == old_version
            for (new, version), (old, old_version) in zip(now, self._seen, strict=True)
        )
        if not same:
            self._seen = now  # holds the tensors, so that no new one can take the place of an old one
            self.renew()
        return self._name
