"""The implementations that tests of the operators run, each where it can."""

import pytest

from hstu_cli.backend import CudaBackend

IMPLEMENTATIONS = (
    "reference",
    "blocked",
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
)

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

every_device = pytest.mark.parametrize("device", DEVICES)

EXACT = (
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("blocked", "cpu", id="blocked"),
    pytest.param("native", "cpu", id="native", marks=pytest.mark.native),
    pytest.param("reference", "cuda", id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param("blocked", "cuda", id="blocked-cuda", marks=pytest.mark.gpu),
)
"""Implementations that know float64, and devices that they run on."""

TRITON_ON_GPU = pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu)

PLACES = (
    pytest.param("blocked", "cpu", id="cpu"),
    pytest.param("blocked", "cuda", id="blocked-cuda", marks=pytest.mark.gpu),
    TRITON_ON_GPU,
)
"""Where tests of the cache run: one implementation on a CPU, as they do not look at operators, and both of a GPU's."""

TRITON_DEVICE = "cpu" if CudaBackend.why_unavailable() else "cuda"
"""Where Triton kernels run: interpreted on a CPU where there is no GPU."""


def device_of(impl: str) -> str:
    """The device that tests of an implementation use."""
    return TRITON_DEVICE if impl == "triton" else "cpu"
