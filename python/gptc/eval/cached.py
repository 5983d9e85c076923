"""The loss of texts that go through a session, whose KV cache may be rounded."""

from __future__ import annotations

import numpy as np

from gptc.engine.arrays import TokenArray
from gptc.engine.session import Session

_ROWS = 64  # logits at a time: a row has as many as the vocabulary


def cached_loss(session: Session, inputs: TokenArray, targets: TokenArray) -> float:
    """The mean loss in nats of targets (B, T) that are not -1, after inputs (B, T)."""
    total, n = 0.0, 0
    for tokens, wanted in zip(inputs, targets, strict=True):
        session.rewind(0, 0)
        for begin in range(0, len(tokens), _ROWS):
            rows = slice(begin, begin + _ROWS)
            some = wanted[rows]
            logits = session.decode(tokens[rows], 0, np.ones(len(some), bool)).astype(np.float64)
            counted = np.flatnonzero(some >= 0)
            logits = logits[counted]
            top = logits.max(axis=1, keepdims=True)
            sums = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
            total += float((sums - logits[np.arange(len(counted)), some[counted]]).sum())
            n += len(counted)
    return total / max(n, 1)
