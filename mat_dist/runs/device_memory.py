"""What a device tells about itself."""

from __future__ import annotations

import resource
import sys

import torch

_MIB = 1 << 20


def device_memory(device: torch.device | str = "cpu") -> dict[str, float]:
    """Memory of this process on `device`, in MiB, since it started.

    Returns:
        CPU: `host_peak_mib`, the largest resident set. CUDA: also `device_allocated_mib` (tensors now),
        `device_peak_mib` (tensors, at most), `device_reserved_mib` (held by the allocator) and, where the driver's
        management library is installed, `device_busy_percent` (share of the last sample period with a kernel running).
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    values = {"host_peak_mib": round(peak * unit / _MIB, 1)}
    device = torch.device(device)
    if device.type != "cuda":
        return values
    values["device_allocated_mib"] = round(torch.cuda.memory_allocated(device) / _MIB, 1)
    values["device_peak_mib"] = round(torch.cuda.max_memory_allocated(device) / _MIB, 1)
    values["device_reserved_mib"] = round(torch.cuda.memory_reserved(device) / _MIB, 1)
    busy = _busy_percent(device)
    if busy is not None:
        values["device_busy_percent"] = busy
    return values


def _busy_percent(device: torch.device) -> float | None:
    """None where the driver does not tell: library absent (ModuleNotFoundError), containers, MIG (RuntimeError)."""
    try:
        return float(torch.cuda.utilization(device))
    except (ModuleNotFoundError, RuntimeError):
        return None
