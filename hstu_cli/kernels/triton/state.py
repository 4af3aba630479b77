"""Whether Triton kernels can run in this process, and why not."""

import functools
from dataclasses import dataclass

from hstu_cli.backend import CudaBackend
from hstu_cli.kernels.triton.chips import OLDEST


@dataclass(frozen=True, slots=True)
class TritonState:
    """Whether the kernels can run here.

    reason: as a clause; where they are not available it says what is missing and how to get it.
    """

    available: bool
    reason: str


@functools.cache
def triton_state() -> TritonState:
    """Look for triton and a GPU that it compiles for; the answer is kept."""
    try:
        import triton
    except ModuleNotFoundError:
        return TritonState(False, "triton is not installed; on Linux, pip install 'hstu[cuda]'")
    except (ImportError, OSError) as error:
        return TritonState(False, f"triton does not load ({error})")
    if is_interpreting():
        return TritonState(True, f"triton {triton.__version__}, interpreted on the CPU (TRITON_INTERPRET is set)")
    if reason := CudaBackend.why_unavailable():
        return TritonState(False, reason.rstrip("."))
    oldest = min(CudaBackend(number).compute_capability for number in range(CudaBackend.device_count()))
    if oldest < OLDEST:
        have, need = (".".join(map(str, capability)) for capability in (oldest, OLDEST))
        return TritonState(
            False, f"the kernels need a GPU of compute capability {need} or newer, and one here has {have}"
        )
    return TritonState(True, f"triton {triton.__version__}")


@functools.cache
def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: decided by TRITON_INTERPRET when they are defined."""
    from triton import knobs

    return knobs.runtime.interpret
