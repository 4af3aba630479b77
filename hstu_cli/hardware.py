"""Hardware presets (published ceilings of known GPUs) and the name of this machine's processor."""

import ctypes
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HardwarePreset:
    """A GPU that users compare with. It changes benchmark defaults and never labels a result.

    `device_pattern` is matched against the driver's device name. `peak_bf16_tflops` is the dense rate (no sparsity) on
    the vendor's data sheet, of the form factor that `peak_of` names, if the sheet tells several apart; the driver's
    names of the others contain one of `slower`.
    """

    name: str
    device_pattern: str
    peak_bf16_tflops: float
    peak_of: str = ""
    slower: tuple[str, ...] = ()
    page_size: int = 32
    num_heads: int = 4
    head_dim: int = 256

    def matches(self, device_name: str) -> bool:
        """Whether a device of this name, as its driver reports it, is this GPU."""
        return re.search(self.device_pattern, device_name, re.IGNORECASE) is not None

    def has_peak(self, device_name: str) -> bool:
        """Whether that device reaches the peak: one whole GPU of the form factor."""
        words = re.split(r"[^a-z0-9]+", device_name.lower())
        return self.matches(device_name) and not {"mig", *self.slower} & set(words)

    @property
    def peak_source(self) -> str:
        """Where the peak comes from, as tables and JSON show it."""
        return f"data sheet of {' '.join(filter(None, (self.name.upper(), self.peak_of)))}, dense"


HARDWARE_PRESETS: dict[str, HardwarePreset] = {
    preset.name: preset
    for preset in (
        HardwarePreset("l20", r"\bL20\b", 119.5),
        HardwarePreset("l40s", r"\bL40S\b", 362.0),
        HardwarePreset("a100", r"\bA100\b", 312.0),
        HardwarePreset("h100", r"\bH100\b", 989.4, "SXM", ("pcie", "nvl")),
        HardwarePreset("h200", r"\bH200\b", 989.4, "SXM", ("nvl",)),
        HardwarePreset("b200", r"\bB200\b", 2250.0, page_size=128, num_heads=8, head_dim=128),
    )
}


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def physical_memory_bytes() -> int:
    """Main memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes() -> int:
    """Main memory that a process can have without swapping, in bytes; all of it where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return physical_memory_bytes()


def keep_freed_memory() -> None:
    """Let the C library keep what a process frees for its next tensor, where that is glibc.

    It gives large blocks back to the system at once, and getting them again means a page fault for
    every 4 KB: more than the arithmetic of a layer costs on some machines. Affects the process.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    mallopt = _c_function("mallopt")
    if mallopt is None:
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 << 20)


def release_freed_memory() -> None:
    """Give what `keep_freed_memory` kept back to the system."""
    malloc_trim = _c_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))


def _c_function(name: str) -> Callable[..., int] | None:
    """A function of the C library, or None where it has no such one."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
