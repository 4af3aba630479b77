"""The folder of a training run: the best checkpoint, the log, and the state to go on from."""

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from hstu_cli.errors import InputError, RunError, UsageError
from hstu_cli.model.checkpoint import CONFIG_FILE, save_checkpoint
from hstu_cli.model.ranking import RankingModel
from hstu_cli.model.state_files import read_file

STATE_VERSION = 1


class RunFolder:
    """`path` itself is a native checkpoint, the best one so far; `path/training` is the run's own.

    Every file is replaced in one step, so a run that is killed leaves the folder as it was before the
    step: nothing is half written.
    """

    def __init__(self, path: Path) -> None:
        """InputError where the folder cannot be made or holds something else, RunError while another run uses it."""
        self.path = path
        self._own = path / "training"
        self.state_file = self._own / "state.pt"
        self.log_file = self._own / "log.csv"
        if not self._own.is_dir() and path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} holds something else already. Name a new folder with --out.")
        try:
            self._own.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self._own / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(f"Another training run is writing to {path}.") from error
        except OSError as error:
            raise InputError(f"{path} cannot be made: {error.strerror or error}.") from error

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def read_state(self, settings: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
        """The state of a run to go on with, or None where there is none.

        UsageError where there is one but `resume` is false, or where it was made with other settings;
        InputError where it is damaged, or missing beside a checkpoint.
        """
        for left_over in self.path.glob(".saving-*"):  # by a run that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        if not self.state_file.exists():
            if (self.path / CONFIG_FILE).exists():
                raise InputError(f"{self.path} holds a checkpoint, but no state to go on from. Name a new folder.")
            return None
        if not resume:
            raise UsageError(
                f"{self.path} holds a training run already. Go on with it by --resume, or name another folder."
            )
        state = read_file(self.state_file)
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION or "settings" not in state:
            raise InputError(f"{self.state_file} is no state of a training run of this version.")
        then, now = json.loads(state["settings"]), json.loads(json.dumps(settings))
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                raise UsageError(
                    f"The run in {self.path} has {name} {then.get(name, 'unset')}, not {now.get(name, 'unset')}. "
                    "Repeat its options to go on with it, or name another folder."
                )
        return state

    def write_state(self, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Keep what `read_state` gives back; RunError where it cannot be written."""
        partial = self.state_file.with_suffix(".partial")
        try:
            torch.save({"version": STATE_VERSION, "settings": json.dumps(settings), **state}, partial)
            partial.replace(self.state_file)
        except (OSError, RuntimeError) as error:  # torch wraps a full disk into a RuntimeError
            partial.unlink(missing_ok=True)
            raise RunError(
                f"The training state cannot be written to {self.state_file}: {_first_line(error)}. "
                "Make room and go on with --resume."
            ) from error

    def write_log(self, epochs: Sequence[Mapping[str, Any]]) -> None:
        """One row per epoch; RunError where it cannot be written."""
        text = io.StringIO()
        if epochs:
            writer = csv.DictWriter(text, list(epochs[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(epochs)
        partial = self.log_file.with_suffix(".partial")
        try:
            partial.write_text(text.getvalue(), encoding="utf-8")
            partial.replace(self.log_file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RunError(f"{self.log_file} cannot be written: {error.strerror}.") from error

    def write_best(self, model: RankingModel) -> None:
        """Make this the checkpoint of the folder; RunError where it cannot be written."""
        try:
            save_checkpoint(model, self.path)
        except InputError as error:
            raise RunError(f"{error} Make room and go on with --resume.") from error


def _first_line(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
