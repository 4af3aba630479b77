"""The implementations that tests of the operators run, each where it can."""

import pytest

from hstu_cli.backend import CudaBackend

IMPLEMENTATIONS = (
    "reference",
    "blocked",
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
)

TRITON_DEVICE = "cpu" if CudaBackend.why_unavailable() else "cuda"
"""Where Triton kernels run: interpreted on a CPU where there is no GPU."""


def device_of(impl: str) -> str:
    """The device that tests of an implementation use."""
    return TRITON_DEVICE if impl == "triton" else "cpu"
