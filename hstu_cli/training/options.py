"""What decides a training run besides its data and its model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """The settings of a run; two runs with the same ones on the same data end with the same weights.

    epochs: times through the training period; batch_size: passes of a step, each over a user or a window of one.
    lr: the highest learning rate, reached after `warmup` (a share of all steps) and then lowered along
      a cosine; weight_decay: of AdamW, on matrices alone, not on embeddings.
    dropout: of token embeddings and of each layer's gated output; id_dropout: the share of user and
      video ids that are replaced by the default row, which so learns to stand for unknown ids.
    next_item_weight: weight of the next-item loss beside the tasks' one.
    num_negatives: items that the next one is told from (None: all, while a softmax bears them).
    """

    epochs: int = 8
    batch_size: int = 128
    lr: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    dropout: float = 0.1
    id_dropout: float = 0.02
    next_item_weight: float = 0.3
    num_negatives: int | None = None
    seed: int = 0
