"""Memory of the stand-in device: storages that say `npu`, whose bytes the CPU's operators can reach."""

import ctypes

import torch

CAPACITY_BYTES = 8 << 30
EXTENSION_DEVICE = 12  # kDLExtDev in dlpack.h, which torch takes for PrivateUse1


class _DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = [("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter)]

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

_owners: dict[int, tuple[object, ...]] = {}  # by the address of the managed tensor: what must live as long as it
_bytes_of: dict[int, torch.Tensor] = {}  # by the address of a storage: its bytes, as the CPU sees them
_peak_bytes = 0

POISON = 0xA5
"""What fresh memory is full of, so that nobody takes it for zeros: NaN-like in no dtype, and far from any result."""


@_Deleter
def _delete(managed: "ctypes._Pointer[_DLManagedTensor]") -> None:
    owner = _owners.pop(ctypes.addressof(managed.contents), None)
    if owner is not None:
        _bytes_of.pop(managed.contents.dl_tensor.data, None)


def new_bytes(num_bytes: int) -> torch.Tensor:
    """Fresh bytes of the device, uint8 [num_bytes], poisoned."""
    content = torch.full((max(num_bytes, 1),), POISON, dtype=torch.uint8)
    managed = _DLManagedTensor()
    shape, strides = (ctypes.c_int64 * 1)(max(num_bytes, 1)), (ctypes.c_int64 * 1)(1)
    managed.dl_tensor = _DLTensor(
        content.data_ptr(), _DLDevice(EXTENSION_DEVICE, 0), 1, _DLDataType(1, 8, 1), shape, strides, 0
    )
    managed.deleter = _delete
    _owners[ctypes.addressof(managed)] = (managed, shape, strides, content)
    _bytes_of[content.data_ptr()] = content
    global _peak_bytes
    _peak_bytes = max(_peak_bytes, used_bytes())
    capsule = _new_capsule(ctypes.addressof(managed), b"dltensor", None)
    return torch._C._from_dlpack(capsule)


def storage_address(tensor: torch.Tensor) -> int:
    """What names the memory that a tensor, on the device or the host, is a part of."""
    return tensor.untyped_storage().data_ptr()


def as_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, sizes and strides as a tensor of the CPU."""
    content = _bytes_of[storage_address(tensor)]
    typed = torch.empty(0, dtype=tensor.dtype)
    return typed.set_(content.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def used_bytes() -> int:
    """Bytes that live tensors of the device take."""
    return sum(content.numel() for content in list(_bytes_of.values()))


def peak_bytes() -> int:
    """The most of them since `reset_peak`."""
    return _peak_bytes


def reset_peak() -> None:
    """Count from now on."""
    global _peak_bytes
    _peak_bytes = used_bytes()


_clone_of_the_host = torch.UntypedStorage.clone


def clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """`UntypedStorage.clone`, of which `copy.deepcopy` makes use: torch's own asks for an allocator in C++."""
    if storage.device.type != "npu":
        return _clone_of_the_host(storage)
    copy = new_bytes(storage.nbytes())
    as_cpu(copy).copy_(_bytes_of[storage.data_ptr()])
    return copy.untyped_storage()
