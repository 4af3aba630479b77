"""Writes new keys and values into pages."""

import torch

from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.kernels.append_pages.flashinfer import why_unavailable as why_no_flashinfer
from hstu_cli.kernels.dispatch import AUTO, RUNS_ON, ImplChoice, runs_on
from hstu_cli.kernels.native.build import native_state
from hstu_cli.kernels.triton.state import triton_state

APPEND_IMPLEMENTATIONS = ("triton", "flashinfer", "native", "torch")
"""All implementations there are, in the order in which `auto` prefers those that run on a device."""


def choose_append_impl(
    requested: str, device_type: str, dtype: torch.dtype, *, head_dim: int | None = None, impl: str = AUTO
) -> ImplChoice:
    """Resolve `--append-impl` for keys of such a dtype; an explicit name is kept or refused, never replaced.

    head_dim: None where it is not known yet. impl: what `--impl` asks of the other operators; where that is no auto,
    auto follows it. Raises UsageError naming the choices, UnavailableError naming what is missing.
    """
    is_known = requested in (AUTO, *APPEND_IMPLEMENTATIONS)
    if not is_known or not runs_on(requested, device_type):
        possible = [n for n in APPEND_IMPLEMENTATIONS if _why_not(n, device_type, dtype, head_dim) is None]
        choices = f"choose from {', '.join((AUTO, *possible))}."
        if not is_known:
            raise UsageError(f"There is no --append-impl {requested!r}; {choices}")
        raise UsageError(f"--append-impl {requested} runs on {RUNS_ON[requested][1]}, not on {device_type}; {choices}")
    if requested != AUTO:
        reason = _why_not(requested, device_type, dtype, head_dim)
        if reason is not None:
            raise UnavailableError(f"--append-impl {requested}: {reason}.")
        return ImplChoice(requested, "as requested")
    preferred = APPEND_IMPLEMENTATIONS if device_type == "cuda" else ("native", "torch")
    because = f"the preferred one for {device_type}"
    if impl != AUTO:
        preferred, because = (impl, "torch") if impl in APPEND_IMPLEMENTATIONS else ("torch",), f"as --impl {impl}"
    reasons = []
    for name in preferred:
        reason = _why_not(name, device_type, dtype, head_dim)
        if reason is None:
            return ImplChoice(name, f"auto: {'; '.join(reasons) or because}")
        reasons.append(reason)
    raise AssertionError("torch works everywhere")


def append_to_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    impl: str = "torch",
) -> None:
    """Write rows of k and v to slots of the pages, in place.

    k, v: [tokens, heads, head_dim]; rows: [n] int64, which tokens to write.
    pages: [num_pages, 2, page_size, heads, head_dim] of one layer; slots: [n] int64, each a page id
    times page_size plus the place in the page, all different but for those that are never read.
    impl: a name from `APPEND_IMPLEMENTATIONS`, as of `choose_append_impl`.
    Raises ValueError where shapes, dtypes or devices do not fit, and for a row or slot that is none where these are on
    the host; on a device Triton's kernel leaves such ones out.
    """
    if k.shape != v.shape or pages.shape[1:2] + pages.shape[3:] != (2, *k.shape[1:]) or rows.shape != slots.shape:
        raise ValueError(
            f"k and v [tokens, heads, head_dim], pages [num_pages, 2, page_size, heads, head_dim] and as many rows "
            f"as slots do not fit: {list(k.shape)}, {list(v.shape)}, {list(pages.shape)}, {len(rows)}, {len(slots)}"
        )
    if {k.dtype, v.dtype} != {pages.dtype} or len({t.device for t in (k, v, rows, pages, slots)}) > 1:
        raise ValueError("k, v and pages must have one dtype, and all arguments one device")
    if rows.device.type == "cpu" and impl in ("torch", "flashinfer") and len(rows):  # the native operator looks itself
        _check_ranges(rows, len(k), slots, pages.shape[0] * pages.shape[2])
    match impl:
        case "torch":
            from hstu_cli.kernels.append_pages.reference import append
        case "flashinfer":
            from hstu_cli.kernels.append_pages.flashinfer import append
        case "native":
            from hstu_cli.kernels.append_pages.native import append
        case "triton":
            from hstu_cli.kernels.append_pages.triton import append
        case _:
            raise ValueError(f"impl must be one of {', '.join(APPEND_IMPLEMENTATIONS)}, not {impl!r}")
    append(k, v, rows, pages, slots)


def check_places(rows: torch.Tensor, slots: torch.Tensor, device: torch.device) -> None:
    """ValueError unless rows and slots are as many int64 on this device."""
    if rows.dim() != 1 or rows.shape != slots.shape or {rows.dtype, slots.dtype} != {torch.int64}:
        raise ValueError(
            f"rows and slots must be as many int64, not {rows.dtype} {list(rows.shape)} and "
            f"{slots.dtype} {list(slots.shape)}"
        )
    if rows.device != device or slots.device != device:
        raise ValueError(f"rows and slots must be on {device}, not {rows.device} and {slots.device}")


def _check_ranges(rows: torch.Tensor, num_rows: int, slots: torch.Tensor, num_slots: int) -> None:
    for name, places, count in (("row", rows, num_rows), ("slot", slots, num_slots)):
        least, most = (int(value) for value in places.aminmax())
        if least < 0 or most >= count:
            raise ValueError(f"there is no {name} {least if least < 0 else most}: there are {count}")


def _why_not(name: str, device_type: str, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why an implementation cannot append such keys on this kind of device, as a clause; None where it can."""
    if name == "torch":
        return None
    if name == "flashinfer":
        return why_no_flashinfer(device_type, dtype, head_dim)
    if not runs_on(name, device_type):
        return f"{name} runs on {RUNS_ON[name][1]}, and this device is {device_type}"
    if name == "native":
        state = native_state(build=False)
        return None if state.built else state.reason
    return None if triton_state().available else triton_state().reason
