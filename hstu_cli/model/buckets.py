"""Sizes of a batch for which graphs are captured: few, and close enough that little of a batch is padding."""

from collections.abc import Iterable
from dataclasses import dataclass

from hstu_cli.config import ModelConfig

LEAST_TOKENS, MOST_TOKENS = 64, 8192
"""The smallest and the largest default bucket. Beyond, computing takes so long that launching hides behind it."""

HALF_STEPS_FROM = 512
"""From here on buckets grow by half and a third in turn, not twofold: rows of padding cost time there."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A size of captured batches: the most new tokens, and the most sequences. In order of their work."""

    num_tokens: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("num_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def holds(self, num_tokens: int, batch_size: int) -> bool:
        """Whether a batch of this size fits."""
        return num_tokens <= self.num_tokens and batch_size <= self.batch_size


def smallest_that_holds(buckets: Iterable[Bucket], num_tokens: int, batch_size: int) -> Bucket | None:
    """The bucket with the least work for a batch of this size; None for one beyond all."""
    return min((bucket for bucket in buckets if bucket.holds(num_tokens, batch_size)), default=None)


def default_buckets(config: ModelConfig, batch_size: int) -> list[Bucket]:
    """Buckets for steps of up to `batch_size` requests, ascending; at most twelve.

    They differ in tokens alone: an empty sequence costs next to nothing, an unused row as much as a used one. The
    largest holds any step of so many requests, unless that has more than 8,192 new tokens.
    """
    most = min(MOST_TOKENS, batch_size * (config.max_history_tokens + config.max_candidates))
    sizes = [LEAST_TOKENS]
    while sizes[-1] < most:
        size = sizes[-1]
        is_power_of_two = size & (size - 1) == 0
        if size < HALF_STEPS_FROM:
            sizes.append(2 * size)
        else:
            sizes.append(size * 3 // 2 if is_power_of_two else size * 4 // 3)
    return [Bucket(min(size, most), batch_size) for size in sizes]
