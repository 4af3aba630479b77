"""The HSTU ranking model, its checkpoints, and the engine that runs it."""

from hstu_cli.config import ModelConfig
from hstu_cli.model.checkpoint import load_checkpoint, save_checkpoint
from hstu_cli.model.ranking import RankingModel

__all__ = ["ModelConfig", "RankingModel", "load_checkpoint", "save_checkpoint"]
