"""The inference engine: one step scores the candidates of a batch of requests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hstu_cli.model.layer import JaggedAttention
from hstu_cli.model.ranking import RankingModel
from hstu_cli.model.tokens import TokenBatch, UserRequest, build_token_batch

# Shapes: R requests of the step, D hidden_dim, 8 tasks.


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed.

    logits: float32 [candidates of all requests, 8] on the host, in the order of the requests.
    last_hidden: [R', D] on the device, the row of the last token before the candidates of those
      requests that have one; has_last: bool [R] on the host, which ones these are.
    """

    logits: np.ndarray
    last_hidden: torch.Tensor
    has_last: np.ndarray


class InferenceEngine:
    """Scores requests with a model, at most `max_candidates` of one request at a time.

    More candidates than that are scored in chunks against the same history: the bound limits
    memory, never results.
    """

    def __init__(self, model: RankingModel, impl: str = "auto") -> None:
        self.model = model
        self.impl = impl

    @torch.no_grad()
    def step(self, requests: Sequence[UserRequest]) -> StepResult:
        """Score every candidate of one request or more; InputError for an id outside a table without keys."""
        limit = self.model.config.max_candidates
        logits: list[list[np.ndarray]] = [[] for _ in requests]
        most = max((len(request.candidates) for request in requests), default=0)
        for start in range(0, max(most, 1), limit):
            members = [i for i, r in enumerate(requests) if start == 0 or start < len(r.candidates)]
            chunks = [replace(requests[i], candidates=requests[i].candidates[start : start + limit]) for i in members]
            batch = build_token_batch(self.model.config, chunks)
            self.model.check_ids(batch)
            hidden = self._hidden(batch)  # [T, D]
            scores = self.model.rank(hidden[batch.candidate_rows()]).cpu().numpy()
            ends = np.cumsum([len(chunk.candidates) for chunk in chunks])
            for i, part in zip(members, np.split(scores, ends[:-1]), strict=True):
                logits[i].append(part)
            if start == 0:
                last_rows = batch.last_rows()
                has_last = last_rows >= 0
                last_hidden = hidden[last_rows[has_last]]
        return StepResult(np.concatenate([part for parts in logits for part in parts]), last_hidden, has_last.numpy())

    def _hidden(self, batch: TokenBatch) -> torch.Tensor:
        """The block's output for a batch from the host, [T, D] on the model's device."""
        on_device = batch.to(self.model.device)
        attention = JaggedAttention(self.model.config, on_device.seq_offsets, on_device.num_candidates, self.impl)
        return self.model(on_device, attention)
