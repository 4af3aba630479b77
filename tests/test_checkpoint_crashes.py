"""A checkpoint that is saved over another one by a process that is killed on the way."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.growing_users import CONFIG, NUM_ITEMS, NUM_USERS, small_model

from hstu_cli.errors import InputError
from hstu_cli.model import ModelConfig, RankingModel, load_checkpoint, save_checkpoint
from hstu_cli.model.ranking import random_model

KILL = """
import os, signal, sys
from pathlib import Path
from hstu_cli.model import load_checkpoint, save_checkpoint
model = load_checkpoint(sys.argv[1])
moves, calls = Path.replace, 0
def move(self, target):
    global calls
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    calls += 1
    return moves(self, target)
Path.replace = move
save_checkpoint(model, sys.argv[2])
"""


def new_model(config: ModelConfig) -> RankingModel:
    return random_model(config, {}, {"video_id": NUM_ITEMS, "user_id": NUM_USERS}, seed=1)


def same_weights(model: RankingModel, other: RankingModel) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("num_moves", [0, 1], ids=["before the weights", "between the weights and the configuration"])
@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, scaling_seqlen=7)], ids=["same", "other"])
def test_a_kill_leaves_no_mixture(config: ModelConfig, num_moves: int, tmp_path: Path) -> None:
    """The other configuration has the same tensors, so nothing but the rest of it would tell."""
    old, new = small_model(seed=0), new_model(config)
    save_checkpoint(old, tmp_path / "folder")
    save_checkpoint(new, tmp_path / "new")
    arguments = [str(tmp_path / "new"), str(tmp_path / "folder"), str(num_moves)]
    done = subprocess.run([sys.executable, "-c", KILL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if config == CONFIG:  # one or the other, whole
        assert same_weights(load_checkpoint(tmp_path / "folder"), new if num_moves else old)
    else:
        with pytest.raises(InputError, match=r"config\.json cannot be read"):
            load_checkpoint(tmp_path / "folder")
    save_checkpoint(new, tmp_path / "folder")
    loaded = load_checkpoint(tmp_path / "folder")
    assert loaded.config == config
    assert same_weights(loaded, new)
