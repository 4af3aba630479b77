"""Checks cached scores against uncached ones, with a budget that comes from the data."""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hstu_cli.bench.session import wider
from hstu_cli.kernels.dispatch import exact_impl
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.tokens import UserRequest

FP32_BUDGET = 1e-5
"""What fp32 may differ by in any case: a few lucky requests say little about how sums of thousands round."""


@dataclass(slots=True)
class CacheVerifier:
    """Recomputes requests without the cache, in the model's dtype and in a wider one on the CPU.

    Errors are relative: the norm of a request's difference to the wide scores over the norm of
    those. A cached score may be twice as wrong as the uncached ones are, and their rounding.
    """

    engine: InferenceEngine
    num_requests: int = 0
    worst_cached_error: float = 0.0
    worst_uncached_error: float = 0.0
    worst_difference: float = 0.0
    worst_request_id: int | None = None
    _wide_engine: InferenceEngine = field(init=False)

    def __post_init__(self) -> None:
        model = copy.deepcopy(self.engine.model).to("cpu", wider(self.engine.model.dtype))
        self._wide_engine = InferenceEngine(model, exact_impl(self.engine.impl))

    def check(self, request_id: int, request: UserRequest, cached: np.ndarray) -> None:
        """Compare the cached logits [C, 8] of one request."""
        uncached = self.engine.step([request], use_cache=False).logits
        wide = self._wide_engine.step([request]).logits
        scale = max(float(np.linalg.norm(wide)), np.finfo(np.float32).tiny)
        cached_error = float(np.linalg.norm(cached - wide)) / scale
        self.num_requests += 1
        uncached_error = float(np.linalg.norm(uncached - wide)) / scale
        # np.maximum keeps a NaN, which is the worst there is.
        self.worst_uncached_error = float(np.maximum(self.worst_uncached_error, uncached_error))
        self.worst_difference = float(np.maximum(self.worst_difference, np.abs(cached - uncached).max(initial=0)))
        if not np.isnan(self.worst_cached_error) and not cached_error <= self.worst_cached_error:
            self.worst_cached_error, self.worst_request_id = cached_error, request_id

    @property
    def budget(self) -> float:
        """The most that a cached request's relative error may be."""
        dtype = self.engine.model.dtype
        return max(
            2 * (self.worst_uncached_error + torch.finfo(dtype).eps), FP32_BUDGET if dtype == torch.float32 else 0
        )

    @property
    def failure(self) -> str | None:
        """What is wrong, or None where every cached score is within the budget."""
        if self.worst_cached_error <= self.budget:
            return None
        return (
            f"cached scores differ: request {self.worst_request_id} is off by {self.worst_cached_error:.3g} "
            f"(relative), the budget is {self.budget:.3g}; logits differ by up to {self.worst_difference:.3g}"
        )

    def summary(self) -> dict[str, Any]:
        """Named as in the JSON record."""
        return {
            "num_requests": self.num_requests,
            "worst_difference": self.worst_difference,
            "worst_cached_error": self.worst_cached_error,
            "worst_uncached_error": self.worst_uncached_error,
            "worst_request_id": self.worst_request_id,
            "budget": self.budget,
        }
