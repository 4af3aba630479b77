"""The HSTU ranking model, its checkpoints, and the engine that runs it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hstu_cli.config import ModelConfig
    from hstu_cli.model.checkpoint import load_checkpoint, save_checkpoint
    from hstu_cli.model.ranking import RankingModel

__all__ = ["ModelConfig", "RankingModel", "load_checkpoint", "save_checkpoint"]

_HOMES = {
    "ModelConfig": "hstu_cli.config",
    "RankingModel": "hstu_cli.model.ranking",
    "load_checkpoint": "hstu_cli.model.checkpoint",
    "save_checkpoint": "hstu_cli.model.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for: benchmarks need no checkpoint library."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
