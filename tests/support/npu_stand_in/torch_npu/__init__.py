"""A stand-in for Ascend's torch_npu: a device `npu` in the CPU's memory, stricter than the real one, for tests.

Importing it takes torch's PrivateUse1 slot for the rest of the process, so only processes made for it do. It needs no
compiler: storage of the device comes from DLPack capsules, and one Python function is the kernel of every operator
that the dispatcher finds no other one for. What reaches it is what torch_npu has to register.
"""

import torch

if getattr(torch, "npu", None) is not None:
    raise ImportError("torch.npu is taken already")

__version__ = torch.__version__.partition("+")[0]

from torch_npu import device, operators
from torch_npu.recorder import RECORDER

__all__ = ["RECORDER"]

device.register()
operators.register()
