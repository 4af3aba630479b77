"""Which implementations a message offers: those that the same command then takes, and all of them."""

import re
from collections.abc import Mapping

import pytest

from hstu_cli.errors import UsageError
from hstu_cli.kernels import dispatch
from hstu_cli.kernels.dispatch import AUTO, IMPLEMENTATIONS, check_possible
from tests.support.cli import failure_of

PLAIN = ("auto", "reference", "blocked")
FUSED = {"reference": "is no fused layer"}
CASES = [
    ("cpu", False, None, (*PLAIN, "native")),
    ("cuda", False, None, (*PLAIN, "triton")),
    ("npu", False, None, (*PLAIN, "ascend")),
    ("cpu", True, None, (*PLAIN, "native")),
    ("cuda", True, None, (*PLAIN, "triton")),
    ("npu", True, None, PLAIN),
    ("cpu", True, FUSED, ("auto", "blocked", "native")),
    ("cuda", True, FUSED, ("auto", "blocked", "triton")),
    ("npu", True, FUSED, ("auto", "blocked")),
]


@pytest.fixture(autouse=True)
def _not_interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a user's machine, where Triton's kernels do not run on a CPU."""
    monkeypatch.setattr(dispatch, "is_interpreting", lambda: False)


def offered(message: str) -> tuple[str, ...]:
    """The names at the end of a message."""
    return tuple(re.split(", | or ", re.search(r"; choose (.*)\.$", message)[1]))


@pytest.mark.parametrize(("device", "gradients", "refused", "taken"), CASES)
def test_a_message_offers_what_is_taken(
    device: str, gradients: bool, refused: Mapping[str, str] | None, taken: tuple[str, ...]
) -> None:
    settings = {"gradients": gradients, "refused": refused}
    for name in taken:
        check_possible(name, device, **settings)
    for name in ("magic", *{AUTO, *IMPLEMENTATIONS} - {*taken}):
        with pytest.raises(UsageError) as caught:
            check_possible(name, device, **settings)
        assert offered(str(caught.value)) == taken
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu", "--impl", "triton"], "runs on an NVIDIA GPU, not on cpu; choose auto, blocked or native."),
        (["--device", "cpu", "--impl", "ascend"], "runs on an NPU, not on cpu; choose auto, blocked or native."),
        (["--device", "cuda", "--impl", "native"], "runs on a CPU, not on cuda; choose auto, blocked or triton."),
        (["--device", "cuda", "--impl", "reference"], "adds its time); choose auto, blocked or triton."),
        (["--device", "npu", "--impl", "ascend"], "computes no gradients; choose auto or blocked."),
    ],
    ids=lambda value: "-".join(value[1::2]) if isinstance(value, list) else None,
)
def test_a_benchmark_of_the_training_layer_offers_its_own(options: list[str], message: str) -> None:
    assert message in failure_of(2, "bench-fused", *options)


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_commands_offer_what_runs_on_the_device(device: str) -> None:
    own = {"cpu": "native", "npu": "ascend"}[device]
    message = f"not on {device}; choose auto, reference, blocked or {own}."
    assert message in failure_of(2, "bench-layer", "--device", device, "--impl", "triton")
    trains = {"cpu": "reference, blocked or native", "npu": "reference or blocked"}[device]
    assert f"choose auto, {trains}." in failure_of(2, "train", "--out", "model", "--device", device, "--impl", "triton")
