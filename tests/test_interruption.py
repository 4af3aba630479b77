"""How a command takes SIGTERM: as an interruption while it runs, and not otherwise."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import typer

from hstu_cli.commands.options import command


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """SIGINT as a terminal's process has it: one that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def exit_code(body: object) -> int:
    with pytest.raises(typer.Exit) as caught:
        command(body)()
    return caught.value.exit_code


def terminated() -> None:
    signal.raise_signal(signal.SIGTERM)  # to this thread: another one would leave this one waiting
    time.sleep(5)


def terminated_inside_a_library() -> None:
    """As a database does: it notices that a handler has raised, and raises an error of its own."""
    with contextlib.suppress(KeyboardInterrupt):
        terminated()
    raise KeyboardInterrupt("from the library")


def interrupted() -> None:
    signal.raise_signal(signal.SIGINT)
    time.sleep(5)


@pytest.mark.parametrize(
    ("body", "code"),
    [(terminated, 143), (terminated_inside_a_library, 143), (interrupted, 130)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_signals_end_a_command_with_their_code(body: object, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(body) == code
    assert capsys.readouterr().err == {143: "Terminated.\n", 130: "Interrupted.\n"}[code]
    assert signal.getsignal(signal.SIGTERM) is before is signal.SIG_DFL


def test_somebody_elses_handler_stays() -> None:
    came: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        command(lambda: signal.raise_signal(signal.SIGTERM))()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert came == [signal.SIGTERM]


def test_a_command_runs_outside_the_main_thread() -> None:
    done: list[str] = []
    thread = threading.Thread(target=command(lambda: done.append("done")))
    thread.start()
    thread.join()
    assert done == ["done"]
