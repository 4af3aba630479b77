"""The stand-in for torch_npu catches what a real device would suffer from: each mistake is made once."""

from typing import Any

import pytest
from support.npu import run_on_stand_in, why_no_stand_in

pytestmark = pytest.mark.skipif(why_no_stand_in() is not None, reason=str(why_no_stand_in()))

SETUP = """
import torch
from hstu_cli.backend import NpuBackend, upload
backend = NpuBackend()
x = torch.arange(12.0).view(3, 4).to('npu')
pages = backend.device_tensor((4, 8), torch.float32)
host = backend.host_tensor((4, 8), torch.float32)
"""

MISTAKES = {
    "a tensor of the host among the operands": ("x + torch.ones(4)", "MixedDevicesError"),
    "an index of the host": ("x[torch.tensor([0, 1])]", "MixedDevicesError"),
    "a mask of the host": ("x.masked_fill(torch.zeros(3, 4, dtype=torch.bool), 0.0)", "MixedDevicesError"),
    "a package that an NPU must not need": ("import triton", "ImportError"),
    "a hidden .cuda()": ("torch.ones(2).cuda()", "CudaUsedError"),
    "a tensor made on a CUDA device": ("torch.ones(2, device='cuda')", "CudaUsedError"),
    "float64 on the device": ("x.double()", "RuntimeError"),
    "a product of integers": ("x.long() @ x.long().mT", "RuntimeError"),
    "an operator that torch_npu lacks": ("torch.special.bessel_j0(x)", "NotOnDeviceError"),
    "an asynchronous copy from pageable memory": ("torch.ones(4).to('npu', non_blocking=True)", "PinnedMemoryError"),
    "an asynchronous copy to pageable memory": ("torch.empty(3, 4).copy_(x, non_blocking=True)", "PinnedMemoryError"),
    "a number of the device as an array": ("x.numpy()", "TypeError"),
    "a side stream that does not wait": (
        "stream = torch.npu.Stream()\n"
        "pages.fill_(1.0)\n"
        "with torch.npu.stream(stream):\n"
        "    host.copy_(pages, non_blocking=True)",
        "StreamOrderError",
    ),
    "pinned memory that is filled anew while it is copied": (
        "host.fill_(1.0)\npages.copy_(host, non_blocking=True)\nhost.fill_(2.0)\nbackend.synchronize()",
        "PinnedMemoryError",
    ),
    "pinned memory that is filled anew before the event behind its copy": (
        "event = torch.npu.Event(); event.record()\n"
        "pages.copy_(host, non_blocking=True)\n"
        "event.synchronize(); host.fill_(2.0)",
        "PinnedMemoryError",
    ),
}

FIRST_910 = ["Ascend910", "Ascend910A", "Ascend910B", "Ascend910PremiumA", "Ascend910ProA", "Ascend910ProB"]
WITHOUT_BF16 = [*FIRST_910, "Ascend310P1", "Ascend310P3"]
WITH_BF16 = ["Ascend910B1", "Ascend910B2C", "Ascend910B4-1", "Ascend910_9391", "Ascend910_9382"]

BF16 = """
def dtypes(names):
    found = {}
    for name in names:
        torch.npu.get_device_name = lambda index=0: name
        found[name] = backend.default_dtype
    del torch.npu.get_device_name
    return found
"""

TWO_TIERS = """
from hstu_cli.kvcache.storage import PageStorage
from hstu_cli.kvcache.transfers import PageCopy, start_transfer
def storage(make, value):
    made = PageStorage(make((2, 2, 2, 4, 1, 8), torch.float32))
    made.pages.fill_(value)
    return made
on_device = storage(backend.device_tensor, 1.0)
host, other = (storage(backend.host_tensor, value) for value in (2.0, 3.0))
write_back = start_transfer(backend, on_device, host, [PageCopy([0], [0])], to_host=True)
onload = start_transfer(backend, other, on_device, [PageCopy([1], [0])], to_host=False, after=[write_back])
"""

RESULTS = {
    "results are the CPU's": ("result = (x @ x.mT + 1).sum().item()", 1143.0),
    "views share memory": (
        "x[1].mul_(0.0); x.mT[2, 2] = 7.0; result = x.flatten().tolist()[4:]",
        [0, 0, 0, 0, 8, 9, 7, 11],
    ),
    "gradients": (
        "w = x.clone().requires_grad_(); (w * w).sum().backward(); result = w.grad.tolist()[0]",
        [0, 2, 4, 6],
    ),
    "a copy that nobody waited for has not happened": (
        "host.fill_(3.0)\n"
        "event = backend.submit_copy(lambda: pages.copy_(host, non_blocking=True), to_host=False)\n"
        "before = pages.sum().item()\n"
        "event.wait()\n"
        "result = [before, pages.sum().item()]",
        [0.0, 96.0],
    ),
    "a source that is overwritten too early is copied as it is then": (
        "pages.fill_(1.0)\n"
        "event = backend.submit_copy(lambda: host.copy_(pages, non_blocking=True), to_host=True)\n"
        "pages.fill_(2.0)\n"
        "event.synchronize()\n"
        "result = host.unique().tolist()",
        [2.0],
    ),
    "pinned memory is free once an event behind its copy has passed": (
        "host.fill_(1.0); pages.copy_(host, non_blocking=True)\n"
        "event = torch.npu.Event(); event.record(); event.synchronize()\n"
        "host.fill_(2.0); backend.synchronize(); result = pages.sum().item()",
        32.0,
    ),
    "a copy comes behind the events that it is told of": (
        "pages.fill_(1.0)\n"
        "first = backend.submit_copy(lambda: host.copy_(pages, non_blocking=True), to_host=True)\n"
        "other = backend.host_tensor((4, 8), torch.float32).fill_(3.0)\n"
        "copy = lambda: pages.copy_(other, non_blocking=True)\n"
        "backend.submit_copy(copy, to_host=False, after=[first]).wait()\n"
        "first.synchronize(); result = [host.unique().tolist(), pages.unique().tolist()]",
        [[1.0], [3.0]],
    ),
    "a victim's pages are written back before others are copied into them": (
        TWO_TIERS + "onload.wait(); write_back.wait()\n"
        "result = [x.pages[:, 0].unique().tolist() for x in (host, on_device)]",
        [[1.0], [3.0]],
    ),
    "an asynchronous copy to the host is there once the host has waited": (
        "pages.fill_(4.0); host.copy_(pages, non_blocking=True); pages.fill_(5.0)\n"
        "before = host.sum().item()\n"
        "backend.synchronize()\n"
        "result = [before, host.sum().item()]",
        [0.0, 128.0],
    ),
    "an upload waits for nothing": ("result = upload([torch.arange(2)], x.device)[0].tolist()", [0, 1]),
    "work on a side stream is done when it is waited for": (
        "ids = torch.tensor([2, 0], dtype=torch.int64)\n"
        "def gather():\n"
        "    staged = pages.index_select(0, upload([ids], pages.device)[0])\n"
        "    host[:2].copy_(staged, non_blocking=True)\n"
        "pages[2].fill_(5.0)\n"
        "event = backend.submit_copy(gather, to_host=True)\n"
        "before = host.sum().item()\n"
        "event.synchronize()\n"
        "result = [before, host.sum().item(), host[0, 0].item()]",
        [0.0, 40.0, 5.0],
    ),
    "masks choose": (
        "mask = x > 5; x[mask] = 0.0; x[mask] += 2.0; result = x.index_put((mask,), x[:1, 1]).tolist()",
        [[0, 1, 2, 3], [4, 5, 1, 1], [1, 1, 1, 1]],
    ),
    "a program compiles no operators": (
        "before = torch.npu.jit_compile; backend.tune_process(); result = [before, torch.npu.jit_compile]",
        [True, False],
    ),
    "a chip without bf16 computes in fp16": (
        BF16 + f"result = dtypes({WITHOUT_BF16})",
        dict.fromkeys(WITHOUT_BF16, "fp16"),
    ),
    "later chips compute in bf16": (BF16 + f"result = dtypes({WITH_BF16})", dict.fromkeys(WITH_BF16, "bf16")),
    "torch_npu knows best whether a chip has bf16": (
        BF16 + "result = []\n"
        "for known in (False, True):\n"
        "    torch.npu.is_bf16_supported = lambda: known\n"
        "    result.append(dtypes(['Ascend910B2', 'Ascend310P3']))\n"
        "del torch.npu.is_bf16_supported",
        [dict.fromkeys(("Ascend910B2", "Ascend310P3"), dtype) for dtype in ("fp16", "bf16")],
    ),
    "memory is counted": (
        "before = backend.available_memory_bytes; y = backend.device_tensor((1000,), torch.float32)\n"
        "result = before - backend.available_memory_bytes",
        4000,
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    jobs = {name: SETUP + code for name, (code, _) in (MISTAKES | RESULTS).items()}
    found = run_on_stand_in([{"code": code} for code in jobs.values()], tmp_path_factory.mktemp("stand-in"))
    return dict(zip(jobs, found, strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error(outcomes: dict[str, Any], mistake: str) -> None:
    assert outcomes[mistake]["error"] == MISTAKES[mistake][1], outcomes[mistake]


@pytest.mark.parametrize("name", RESULTS)
def test_what_is_right_works(outcomes: dict[str, Any], name: str) -> None:
    assert outcomes[name]["error"] is None, outcomes[name]
    assert outcomes[name]["result"] == RESULTS[name][1]


def test_every_wait_is_counted(outcomes: dict[str, Any]) -> None:
    waits = outcomes["results are the CPU's"]["recorded"]["syncs"]
    assert sum(waits.values()) == 2  # x goes to the device, the sum comes from it
    waits = outcomes["an upload waits for nothing"]["recorded"]["syncs"]
    assert sum(waits.values()) == 2  # x, and the list
    waits = outcomes["masks choose"]["recorded"]["syncs"]
    assert {where.partition(" at ")[0]: count for where, count in waits.items()} == {
        "copy from the host": 1,
        "aten::index": 1,
        "aten::index_put_": 2,
        "aten::index_put": 1,
        "copy to the host": 1,
    }
