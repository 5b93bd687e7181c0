"""What every fixed length, and the plan that history alone makes, would have brought on the rounds that were run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nwor_vllm.policy.cost import Cost
from nwor_vllm.policy.evidence import Batch, Seen
from nwor_vllm.policy.stop import Floats, Ints


class Compared(NamedTuple):
    """Steps as they were, [steps], and under every alternative, [steps, rungs and the plain plan]."""

    tokens: Floats
    seconds: Floats
    shadow_tokens: Floats
    shadow_seconds: Floats
    whole: Ints  # which of the steps given these are: those of decoding rounds alone


def compare(seen: Sequence[Seen], batch: Batch, history: Floats, soft: Floats, rungs: Ints, cost: Cost) -> Compared:
    index = np.arange(history.shape[1])
    whole = np.array([not s.step.prefill_tokens and len(s.step.rounds) == s.step.requests for s in seen])
    n = np.diff(batch.starts).astype(float)
    verified, accepted = batch.verified[:, None], batch.accepted[:, None]
    # Kept by a fixed length: known up to the first rejection, expected beyond a cut.
    cut = (accepted == verified) & (index >= verified)
    chance = np.where(cut, history, 1.0)
    told = np.flatnonzero(~np.isnan(soft) & (batch.accepted == batch.verified))
    chance[told, batch.verified[told]] = soft[told]  # the confidence that cut the row says what it would have kept
    kept = (index < accepted) + np.multiply.accumulate(chance, axis=1) * cut
    gain = np.zeros((len(kept), len(index) + 1))
    np.add.accumulate(kept, axis=1, out=gain[:, 1:])
    plain = batch.plain
    sums = np.add.reduceat(np.column_stack([gain[:, rungs], gain[batch.every, plain], plain]), batch.starts[:-1])
    lengths = rungs.astype(float)
    longest = np.array([s.plain.k for s in seen], float)
    slots = np.column_stack([n[:, None] * lengths, sums[:, -1]])
    drafts = np.column_stack([np.broadcast_to(lengths, (len(seen), len(lengths))), longest])
    timed = np.array([s.timed() for s in seen], float)
    context, measured = timed[:, 4], timed[:, 5]
    wide = drafts.shape[1]
    predicted = cost.predict(
        np.append(np.repeat(n, wide), timed[:, 0]),
        np.append((n[:, None] + slots).ravel(), timed[:, 1]),
        np.append(drafts.ravel(), timed[:, 2]),
        np.append(np.repeat(context, wide), context),
        np.append(np.zeros(drafts.size), timed[:, 3]),
    )
    shadow, expected = predicted[: drafts.size].reshape(drafts.shape), predicted[drafts.size :]
    measured = np.where(measured > 0, measured, expected)  # NaN too
    seconds = np.minimum(np.maximum(measured, 0.5 * expected), 2.0 * expected)
    tokens = n + np.add.reduceat(batch.accepted, batch.starts[:-1])
    shadow_tokens = n[:, None] + sums[:, :-1]
    return Compared(tokens[whole], seconds[whole], shadow_tokens[whole], shadow[whole], np.flatnonzero(whole))
