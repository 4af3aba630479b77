"""How many query rows a strip of blocked attention has on an accelerator: measured once for a chip, and kept.

Fewer rows compute less beyond the mask, more rows launch fewer and larger products. Which is faster nobody can tell
without the chip.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hstu_cli.backend import backend_of
from hstu_cli.errors import UsageError
from hstu_cli.kernels.attention import blocked
from hstu_cli.kernels.native.build import cache_folder
from hstu_cli.kernels.tuning import Tuner

VARIABLE = "HSTU_BLOCK_ROWS"
"""The environment variable that decides by hand."""

KERNEL = "blocked_attention"
"""What the tuner's files call it."""

MEASURED_TOKENS, MEASURED_CANDIDATES = 4096, 256
"""The sequence on which strips are measured: its tokens, candidates among them."""


@dataclass(frozen=True, slots=True)
class BlockRows:
    """One of the choices."""

    num_rows: int

    @property
    def label(self) -> str:
        """As tables show it."""
        return f"{self.num_rows} rows"

    def to_json(self) -> dict[str, Any]:
        """What names it in a file."""
        return {"num_rows": self.num_rows}


CANDIDATES = tuple(map(BlockRows, (512, 256, 128, 1024)))
"""The choices, the best guess first."""


@dataclass(frozen=True, slots=True)
class BlockRowsChoice:
    """The rows of a strip, and where they are from, as records show them."""

    num_rows: int
    reason: str


def choose_block_rows(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    head_dim: int,
    run: Callable[[torch.Tensor, int], object],
    *sources: str,
) -> BlockRowsChoice:
    """The rows of a strip for heads like these, measured now if nobody did; not while a graph is captured.

    run: attention over one sequence of `MEASURED_TOKENS` for q = k = v [tokens, heads, head_dim], in strips of so many
    rows. sources: the files with its code. Where memory does not suffice to measure, it is the best guess for the rest
    of this process. UsageError for an `HSTU_BLOCK_ROWS` that is no number of rows.
    """
    by_hand = block_rows_by_hand()
    if by_hand is not None:
        return BlockRowsChoice(by_hand, f"{VARIABLE} says so")
    if device.type == "cpu":
        return BlockRowsChoice(blocked.BLOCK_ROWS, "what is best on a CPU")
    tuner, key = _tuner(device), (dtype, num_heads, head_dim)

    @functools.cache
    def x() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(MEASURED_TOKENS, num_heads, head_dim, generator=generator).to(device, dtype)

    try:
        chosen = tuner.choose(KERNEL, key, CANDIDATES, lambda config: run(x(), config.num_rows), *sources)
    except RuntimeError as error:  # torch's own class for it, or the driver's words
        if "out of memory" not in str(error).lower():
            raise
        chosen = tuner.settle(KERNEL, key, CANDIDATES[0], "a guess: memory did not suffice to measure")
    return BlockRowsChoice(chosen.num_rows, tuner.reason(KERNEL, key) or "a guess while a graph is captured")


def block_rows_by_hand() -> int | None:
    """The rows that `HSTU_BLOCK_ROWS` asks for, None where it is not set; UsageError where it is no number of rows."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{VARIABLE} takes a number of rows from 1 on, not {text!r}.")
    return int(text)


@functools.cache
def _tuner(device: torch.device) -> Tuner[BlockRows]:
    backend = backend_of(device)
    return Tuner(backend, cache_folder() / "tuning", backend.versions())
