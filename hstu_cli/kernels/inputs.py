"""What several operators check of their inputs."""

import torch


def check_alike(names: str, x: torch.Tensor, *others: torch.Tensor) -> None:
    """ValueError that names the others where they are not of the dtype, and on the device, of x.

    Within torch.autocast dtypes may differ: it runs torch's own operators, which it casts for.
    """
    mixed = any(other.dtype != x.dtype for other in others)
    if (mixed and not casts(x.device.type)) or any(other.device != x.device for other in others):
        raise ValueError(f"{names} must be {x.dtype} on {x.device} like x")


def casts(device_type: str) -> bool:
    """Whether the caller is within torch.autocast for this type of device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
