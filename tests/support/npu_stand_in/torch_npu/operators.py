"""Operators of the stand-in device: every one computes on the CPU, after checks that a real device makes too."""

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from torch_npu import device, graphs, memory, pinned
from torch_npu.recorder import RECORDER

aten = torch.ops.aten

MATMULS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot"}

LIST = Path(__file__).parent.parent / "npu_ops_2.13.0.txt"
"""What torch_npu registers."""

MADE_OF_OTHERS = {"_to_copy"}
"""Listed operators that the stand-in leaves to torch, which makes them of an empty tensor and a copy."""

VIEWS = ("as_strided", "view", "_reshape_alias", "unfold")

HOST_READS = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "is_nonzero"}
"""Operators whose result has a size, or is a value, that the host has to wait for; an index by a mask is one too."""

INDEXED = {"index", "index_put", "_index_put_impl"}
MASKS = (torch.bool, torch.uint8)

_last_write: dict[int, int] = {}  # by storage of the device: the last operator of the default stream that wrote to it
_done = itertools.count(1)
_num_done = 0

# They live as long as the process: what they register goes with them.
_FALLBACK = torch.library.Library("_", "IMPL")
_DEVICE = torch.library.Library("aten", "IMPL", "PrivateUse1")
_HOST = torch.library.Library("aten", "IMPL", "CPU")


class MixedDevicesError(RuntimeError):
    """An operator of the device was given a tensor of the host."""


class NotOnDeviceError(RuntimeError):
    """An operator that torch_npu does not register: on a real device the CPU would compute it, in silence."""


class PinnedMemoryError(RuntimeError):
    """An asynchronous copy from or to host memory that is not pinned, or from what is overwritten before it is over."""


class StreamOrderError(RuntimeError):
    """A side stream reads or overwrites what the default stream has not been waited for."""


def num_done() -> int:
    """Operators that the default stream has run."""
    return _num_done


def register() -> None:
    """Give the dispatcher the kernels: those of the listed operators, and a refusal of all others."""
    _FALLBACK.fallback(_refuse, "PrivateUse1")
    own = {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "copy_": _copy,
        "_local_scalar_dense": _local_scalar_dense,
        "resize_": _resize,
        "set_.source_Storage": _set_all,
        "set_.source_Storage_storage_offset": _set,
        **{name: _view_kernel(getattr(aten, name).default) for name in VIEWS},
    }
    for name in listed_operators():
        base, _, overload = name.partition(".")
        op = getattr(getattr(aten, base, None), overload or "default", None)
        if name in own:
            _DEVICE.impl(name, own[name])
        elif op is not None and name not in MADE_OF_OTHERS and not _is_composite(op) and not _returns_view(op):
            _DEVICE.impl(name, partial(_run, op))
    torch.UntypedStorage.clone = memory.clone_storage
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that its own kernel is replaced
        _HOST.impl("empty.memory_format", pinned.host_empty, allow_override=True)
    _HOST.impl("is_pinned", pinned.is_pinned)
    _HOST.impl("_pin_memory", pinned.pin_memory)


def listed_operators() -> list[str]:
    """Names of the operators that torch_npu registers, such as `add.out`."""
    return [line for line in LIST.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def _is_composite(op: OpOverload) -> bool:
    """Whether it is made of others, also under autograd; those are checked instead."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def _returns_view(op: OpOverload) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


def _refuse(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    raise NotOnDeviceError(f"torch_npu has no {op}: the CPU would compute it")


def _run(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Any operator without a kernel of its own: on the CPU's view of the same memory."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    _check_operands(op, tensors)
    base = op._schema.name.removeprefix("aten::").rstrip("_")
    indices = args[1] if base in INDEXED else ()
    by_mask = any(isinstance(index, torch.Tensor) and index.dtype in MASKS for index in indices)
    if base in HOST_READS or by_mask or (base == "repeat_interleave" and kwargs.get("output_size") is None):
        RECORDER.sync(op._schema.name)
        device.STATE.current.passed()
    if base in MATMULS and any(not t.dtype.is_floating_point for t in tensors):
        raise RuntimeError(f"{op} multiplies {[str(t.dtype) for t in tensors]}: the device multiplies floats alone")
    _record(str(op).removeprefix("aten."), tensors)
    stream = device.STATE.current
    if graphs.current is None and stream.default:
        return _compute(op, args, kwargs)
    if graphs.current is None:
        _check_order(tensors)
    result = _declared(op, args, kwargs)
    _put_off(partial(_compute_into, result, op, args, kwargs))
    return result


def _put_off(work: Callable[[], list[torch.Tensor]]) -> None:
    """Do this when the graph that is captured replays, or when somebody waits for the stream."""
    if graphs.current is not None:
        graphs.current.add(lambda: _replayed(work))
    else:
        device.STATE.current.submit(work)


def _declared(op: OpOverload, args: Any, kwargs: Any) -> Any:
    """What an operator will return, with nothing in it yet: it is known by sizes alone."""
    empty: list[tuple[torch.Tensor, torch.Tensor]] = []  # an operator may resize these

    def without_data(tensor: torch.Tensor) -> torch.Tensor:
        shadow = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
        if not tensor.numel():
            empty.append((tensor, shadow))
        return shadow

    sizes = op(*_map_tensors(args, without_data), **_map_tensors(kwargs, without_data))
    for tensor, resized in empty:
        if resized.numel():
            _rebind(tensor, resized.size(), resized.stride())
    return _returned(op, args, kwargs, sizes, lambda x: _new(x.size(), x.stride(), x.dtype))


def _replayed(work: Callable[[], list[torch.Tensor]]) -> None:
    """Work of a graph as an operator of the stream on which it replays."""
    global _num_done
    if device.STATE.current.default:
        _num_done = next(_done)
    for tensor in work():
        _note_write(tensor)


def _compute_into(result: Any, op: OpOverload, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The operator, now, into what was declared of it; which is returned."""
    values = pytree.tree_leaves(_compute(op, args, kwargs))
    own = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
    for tensor, value in zip(own, [x for x in values if isinstance(x, torch.Tensor)], strict=True):
        if tensor is not value:
            memory.as_cpu(tensor).copy_(memory.as_cpu(value))
    return own


def _compute(op: OpOverload, args: Any, kwargs: Any) -> Any:
    """The operator, now."""
    empty: list[tuple[torch.Tensor, torch.Tensor]] = []  # an operator may resize these

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "npu":
            return tensor
        if tensor.numel():
            return memory.as_cpu(tensor)
        empty.append((tensor, torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)))
        return empty[-1][1]

    result = op(*_map_tensors(args, to_cpu), **_map_tensors(kwargs, to_cpu))
    for tensor, resized in empty:
        if resized.numel():
            _rebind(tensor, resized.size(), resized.stride())
            memory.as_cpu(tensor).copy_(resized)
    return _returned(op, args, kwargs, result)


def _map_tensors(tree: Any, function: Any) -> Any:
    """The same arguments with other tensors; a device among them becomes the CPU."""

    def replace(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return function(x)
        return torch.device("cpu") if isinstance(x, torch.device) else x

    return pytree.tree_map(replace, tree)


def _returned(
    op: OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    make: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Any:
    """Results as the schema says: an argument that was written, or a tensor that `make` makes, new on the device."""
    written = _written(op, args, kwargs)
    for tensor in pytree.tree_leaves(list(written.values())):
        if isinstance(tensor, torch.Tensor):
            _note_write(tensor)
    single = not isinstance(result, tuple)
    returned = []
    for info, value in zip(op._schema.returns, (result,) if single else result, strict=False):
        if info.alias_info is None:
            returned.append(pytree.tree_map_only(torch.Tensor, make or _to_device, value))
        elif info.alias_info.is_write:
            returned.append(written[frozenset(info.alias_info.before_set)])
        else:
            raise NotImplementedError(f"{op} makes a view; the stand-in needs a kernel of its own for it")
    return returned[0] if single and returned else tuple(returned) or None


def _written(op: OpOverload, args: Any, kwargs: Any) -> dict[frozenset[str], Any]:
    """The arguments that an operator writes to, by the name that its schema gives their memory."""
    named = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
    return {
        frozenset(argument.alias_info.before_set): named.get(argument.name)
        for argument in op._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }


def _check_order(tensors: list[torch.Tensor]) -> None:
    """On a side stream: what the default stream wrote must have been waited for."""
    stream = device.STATE.current
    for tensor in tensors:
        if tensor.device.type == "npu" and _last_write.get(memory.storage_address(tensor), 0) > stream.seen:
            raise StreamOrderError("work on a side stream comes before what the default stream wrote there")


def _check_operands(op: OpOverload, tensors: list[torch.Tensor]) -> None:
    """What a device refuses: tensors of the host, other than a number that an operator may take as a scalar."""
    for tensor in tensors:
        if tensor.device.type != "npu" and tensor.dim():
            kinds = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors)
            raise MixedDevicesError(f"{op} needs all tensors on one device, not {kinds}")


def _record(name: str, tensors: list[torch.Tensor]) -> None:
    global _num_done
    RECORDER.operator(name, [t for t in tensors if t.device.type == "npu"])
    if device.STATE.current.default:
        _num_done = next(_done)


def _note_write(tensor: torch.Tensor) -> None:
    if tensor.device.type == "npu" and device.STATE.current.default:
        _last_write[memory.storage_address(tensor)] = _num_done


def _new(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    if dtype in (torch.float64, torch.complex128):
        raise RuntimeError(f"{dtype} on the device: it has none")
    extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else 0
    flat = memory.new_bytes(extent * dtype.itemsize)
    if graphs.current is not None:
        graphs.current.allocated(flat)
    _last_write.pop(memory.storage_address(flat), None)
    tensor = torch._C._acc.create_empty_tensor((0,), dtype)
    return _set(tensor, flat.untyped_storage(), 0, size, stride)


def _rebind(tensor: torch.Tensor, size: Any, stride: Any) -> None:
    """Give an empty tensor new memory."""
    _set(tensor, _new(size, stride, tensor.dtype).untyped_storage(), 0, size, stride)


def _set(tensor: torch.Tensor, storage: Any, offset: int, size: Any, stride: Any) -> torch.Tensor:
    # The CPU's kernel looks at nothing but sizes.
    kernel = aten.set_.source_Storage_storage_offset
    return kernel._op_dk(torch._C.DispatchKey.CPU, tensor, storage, offset, size, stride)


def _set_all(tensor: torch.Tensor, storage: Any) -> torch.Tensor:
    return _set(tensor, storage, 0, [storage.nbytes() // tensor.dtype.itemsize], [1])


def _to_device(value: torch.Tensor) -> torch.Tensor:
    """A result of the CPU as a new tensor of the device, with the same strides."""
    result = _new(value.size(), value.stride(), value.dtype)
    memory.as_cpu(result).copy_(value)
    _note_write(result)
    return result


def _empty(
    size: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> torch.Tensor:
    RECORDER.operator("empty.memory_format", [])
    pinned.contiguous_alone(memory_format)
    return _new(size, pinned.contiguous_strides(size), dtype or torch.get_default_dtype())


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> torch.Tensor:
    RECORDER.operator("empty_strided", [])
    return _new(size, stride, dtype or torch.get_default_dtype())


def _view_kernel(op: OpOverload) -> Any:
    def kernel(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The CPU's kernel looks at nothing but sizes, and keeps storage and device.
        return op._op_dk(torch._C.DispatchKey.CPU, tensor, *args, **kwargs)

    return kernel


def _resize(tensor: torch.Tensor, size: Any, *, memory_format: Any = None) -> torch.Tensor:
    if list(tensor.shape) != list(size):
        if tensor.numel():
            raise NotImplementedError("the stand-in resizes no tensor that holds something")
        _rebind(tensor, size, pinned.contiguous_strides(size))
    return tensor


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Within the device, or to or from it: those wait unless they are asynchronous, which takes pinned memory."""
    hosts = [t for t in (target, source) if t.device.type == "cpu"]
    if hosts:
        RECORDER.refuse_in_capture("a copy from or to the host")
    _record("copy_", [target, source])
    stream = device.STATE.current
    if hosts and not non_blocking:
        RECORDER.sync("copy to the host" if target is hosts[0] else "copy from the host")
        stream.passed()
    elif hosts and not pinned.is_pinned(hosts[0]):
        raise PinnedMemoryError("an asynchronous copy needs pinned host memory")

    def perform() -> list[torch.Tensor]:
        _cpu(target).copy_(_cpu(source))
        return [target]

    if graphs.current is not None:
        _put_off(perform)
    elif stream.default and non_blocking and target.device.type == "cpu":
        content = memory.as_cpu(source).clone()  # what it is now; the host sees it when it has waited
        stream.submit(lambda: target.copy_(content))
    elif stream.default and non_blocking and source.device.type == "cpu":
        perform()
        _watch(source, stream)
    elif stream.default or (hosts and not non_blocking):
        perform()
    else:
        _check_order([target, source])
        stream.submit(perform)
    _note_write(target)
    return target


def _watch(source: torch.Tensor, stream: "device.Stream") -> None:
    """The device may read pinned memory until the host has waited for it: then it must hold what it held."""
    source, content = source.detach(), source.detach().clone()

    def check() -> None:
        if not torch.equal(source.view(torch.uint8), content.view(torch.uint8)):
            raise PinnedMemoryError("pinned memory was overwritten before its copy to the device was waited for")

    stream.check_when_passed(check)


def _cpu(tensor: torch.Tensor) -> torch.Tensor:
    return memory.as_cpu(tensor) if tensor.device.type == "npu" else tensor


def _local_scalar_dense(tensor: torch.Tensor) -> Any:
    _record("_local_scalar_dense", [tensor])
    RECORDER.sync("item")
    device.STATE.current.passed()
    return memory.as_cpu(tensor).item()
