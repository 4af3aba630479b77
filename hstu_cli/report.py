"""What the user sees: Rich tables, the JSON record, warnings and progress; one record feeds them all."""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hstu_cli import __version__
from hstu_cli.errors import HstuError, InputError, RunError, UsageError
from hstu_cli.hardware import cpu_name

SCHEMA_VERSION = 1
PACKAGES = (
    "torch",
    "triton",
    "torchrec",
    "fbgemm-gpu",
    "torch-npu",
    "flashinfer-python",
    "dynamicemb",
    "numpy",
    "pyarrow",
    "duckdb",
)
"""Packages whose versions a record carries (null where they are not installed)."""


FILE_WIDTH = 140
"""Columns of tables that go into a file or a pipe."""


class Reporter:
    """One command's output: tables and JSON to stdout, everything else to stderr.

    A `--output-json` file that cannot be written is an InputError at once, not after the run.
    """

    def __init__(
        self,
        command: str,
        args: Mapping[str, Any],
        *,
        json_only: bool = False,
        output_json: Path | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.out = Console(highlight=False)
        if not self.out.is_terminal:
            self.out.width = FILE_WIDTH
        self.err = Console(stderr=True, highlight=False)
        self.json_only = json_only
        self.output_json = output_json
        self.record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "command": command,
            "status": "valid",
            "reasons": [],
            "args": dict(args),
            "metadata": dict(metadata or {}),
        }
        if output_json is not None and (output_json.is_dir() or not os.access(output_json.parent, os.W_OK)):
            raise InputError(f"--output-json {output_json} cannot be written.")

    def warn(self, message: str) -> None:
        """A warning on stderr."""
        self.err.print(f"[yellow]Warning:[/yellow] {_escaped(message)}", soft_wrap=True)

    def note(self, message: str) -> None:
        """A line for the reader: on stdout beside tables, on stderr where stdout is JSON."""
        (self.err if self.json_only else self.out).print(_escaped(message), soft_wrap=True)

    @contextmanager
    def running(self, tables: Callable[[Mapping[str, Any]], list[Table]]) -> Iterator[dict[str, Any]]:
        """The run proper, which fills the record; at its end tables and JSON come out.

        An error or Ctrl-C in it still leaves what is finished, with status invalid and the reason.
        """
        try:
            yield self.record
        except BrokenPipeError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            self.record["status"] = "invalid"
            self.record["reasons"].append(_reason(error))
            self._finish(tables(self.record))
            raise
        self._finish(tables(self.record))

    @contextmanager
    def progress(self) -> Iterator["ProgressLine"]:
        """A line about what is going on, on stderr where that is a terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.err, transient=True, disable=not self.err.is_terminal) as progress:
            yield ProgressLine(progress)

    def _finish(self, tables: list[Table]) -> None:
        try:
            self._write(tables)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise RunError(f"The result cannot be written to stdout: {error.strerror}.") from error

    def _write(self, tables: list[Table]) -> None:
        record = plain(self.record)
        if self.output_json is not None:
            _write_whole(self.output_json, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        if self.json_only:
            print(json.dumps(record, ensure_ascii=False), flush=True)
            return
        for table in tables:
            self.out.print(table)
        print(json.dumps(_without_samples(record), indent=2, ensure_ascii=False), flush=True)


class ProgressLine:
    """The bar of one activity at a time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, amount="")

    def stage(self, description: str) -> None:
        """Begin another activity of unknown length."""
        self._progress.update(self._task, description=description, total=None, completed=0, amount="")

    def bytes(self, done: int, total: int | None) -> None:
        """Progress in bytes."""
        amount = f"{done / 1e6:,.1f} / {total / 1e6:,.1f} MB" if total else f"{done / 1e6:,.1f} MB"
        self._progress.update(self._task, completed=done, total=total, amount=amount)

    def count(self, done: int, total: int, unit: str) -> None:
        """Progress in things."""
        self._progress.update(self._task, completed=done, total=total, amount=f"{done:,} / {total:,} {unit}")


def environment(device_name: str | None = None, device_memory_bytes: int | None = None) -> dict[str, Any]:
    """The machine and the versions of everything that decides a measurement."""
    return {
        "hstu": __version__,
        "python": platform.python_version(),
        **{name.replace("-", "_"): package_version(name) for name in PACKAGES},
        "os": platform.platform(),
        "cpu": cpu_name(),
        "threads": _num_threads(),
        "device_name": device_name,
        "device_memory_bytes": device_memory_bytes,
        "git_commit": _git_commit(),
    }


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def parse_metadata(pairs: list[str]) -> dict[str, str]:
    """`--metadata K=V` options as a dictionary; UsageError for one without a key or `=`."""
    metadata = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"--metadata takes KEY=VALUE, not {pair!r}.")
        metadata[key] = value
    return metadata


def key_value_table(title: str, rows: Mapping[str, object]) -> Table:
    """A two-column table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, _escaped(format_value(value)))
    return table


def format_value(value: object) -> str:
    """A value as tables show it: thousands separated, floats with four digits, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:,.4g}"


def with_range(median: float, limits: Sequence[float], shown: Callable[[float], str] = format_value) -> str:
    """A median and, in brackets, the least and the largest value."""
    return f"{shown(median)} ({shown(limits[0])}-{shown(limits[1])})"


def _reason(error: BaseException) -> str:
    """Why a run is invalid, in a line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, HstuError):
        return str(error)
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _num_threads() -> int:
    """Threads that torch uses, where it is loaded; else the CPUs this process may run on."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else len(os.sched_getaffinity(0))


def _git_commit() -> str | None:
    """The commit that this package runs from, where it runs from a checkout."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def plain(value: Any) -> Any:
    """JSON-ready: tuples as lists, paths and enums as strings, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _without_samples(value: Any) -> Any:
    """The record without its raw samples and the costs of each batch, which only the file and `--format json` carry."""
    if isinstance(value, dict):
        return {k: _without_samples(v) for k, v in value.items() if k not in ("samples", "batch_costs")}
    return [_without_samples(v) for v in value] if isinstance(value, list) else value


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"--output-json {path} could not be written: {error.strerror or error}.") from error


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
