"""What tests of attention need to run Triton's kernels where they can run."""

import dataclasses
from typing import Any

import pytest
import torch

from hstu_cli.kernels.triton.tuning import LaunchConfig, pinned_configs
from support.implementations import TRITON_DEVICE, device_of

INTERPRETED = TRITON_DEVICE == "cpu"
CONFIG = LaunchConfig.of(BLOCK_M=128, BLOCK_N=128, num_warps=4, num_stages=2)
"""Blocks that the interpreter is quick with; smaller ones have tests of their own."""


def skip_unless_computed(impl: str, dtype: torch.dtype) -> None:
    """Skip what Triton's kernels refuse, and what its interpreter cannot do."""
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("Triton's attention has no float64")
    if impl == "triton" and dtype == torch.bfloat16 and INTERPRETED:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")


def moved(inputs: Any, impl: str) -> Any:
    """A dataclass of tensors on the device where tests of the implementation run; the same on a CPU."""
    if device_of(impl) == "cpu":
        return inputs
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return dataclasses.replace(
        inputs, **{name: x.to(device_of(impl)) for name, x in fields.items() if isinstance(x, torch.Tensor)}
    )


@pytest.fixture
def quick_config():
    """One configuration for all shapes, so that the interpreter is quick; a GPU takes what it is tuned to."""
    kernels = ("hstu_attention", "hstu_paged_attention") if INTERPRETED else ()
    with pinned_configs(dict.fromkeys(kernels, CONFIG)):
        yield
