"""Recognises a history by its content: a digest of the tokens before the candidates."""

import hashlib

import numpy as np

from hstu_cli.kvcache.tier import CachedTokens

DIGEST_BYTES = 16


class HistoryFingerprint:
    """The history of one request, as the model sees it, to be compared with what an entry holds.

    identity: bytes that stand for the model's weights; context: int64 ids of the context tokens;
    video_ids, action_weights: integers [events], the history from `window_start` on.
    """

    def __init__(
        self,
        identity: bytes,
        context: np.ndarray,
        video_ids: np.ndarray,
        action_weights: np.ndarray,
        window_start: int,
    ) -> None:
        self.num_context_tokens = len(context)
        self.num_events = len(video_ids)
        self.window_start = window_start
        self._prefix = identity + window_start.to_bytes(8, "little") + context.astype(np.int64).tobytes()
        self._events = np.stack([video_ids, action_weights], axis=1).astype(np.int64, copy=False)

    @property
    def num_tokens(self) -> int:
        """Tokens before the candidates."""
        return self.num_context_tokens + 2 * self.num_events

    def matches(self, tokens: CachedTokens) -> bool:
        """Whether the tokens of an entry are exactly this history's first ones."""
        return (
            tokens.window_start == self.window_start
            and tokens.num_events <= self.num_events
            and tokens.digest == self._digest(tokens.num_events)
        )

    def tokens(self) -> CachedTokens:
        """What an entry with this whole history holds."""
        return CachedTokens(self.num_tokens, self.num_events, self.window_start, self._digest(self.num_events))

    def _digest(self, num_events: int) -> bytes:
        digest = hashlib.blake2b(self._prefix, digest_size=DIGEST_BYTES)
        digest.update(self._events[:num_events].tobytes())
        return digest.digest()
