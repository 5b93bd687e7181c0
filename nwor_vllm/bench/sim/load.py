"""Who asks for what: clients that each send their next request when the last one has ended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nwor_vllm.bench.traces import Trace

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Load:
    """`batch` clients, dealt the requests of `order` in turn, serve them round and round until `tokens` are out."""

    trace: Trace
    order: tuple[int, ...]  # request numbers
    batch: int
    tokens: int
    batches: tuple[int, ...] = ()  # bursts: the number of clients changes to the next of these
    period: int = 0  # tokens between changes
    together: bool = False  # clients begin with their first texts' first tokens, not spread over these texts

    @property
    def clients(self) -> int:
        return max(self.batches, default=self.batch)

    def size(self, emitted: int) -> int:
        return self.batches[(emitted // self.period) % len(self.batches)] if self.batches else self.batch


class Lanes:
    """The texts of each client end to end, as flat arrays: `position` in the trace, and tokens left behind each.

    Clients `start` spread over their first texts, like those of a server that has run for a while: texts of one length
    would else be in step for good, and every step would see all of them at the same place.
    """

    def __init__(self, load: Load) -> None:
        trace, n = load.trace, load.clients
        lengths = np.diff(trace.starts)
        mean = float(lengths[list(load.order)].mean())
        # No client gets twice its share before its texts repeat.
        each = max(1, round(2 * load.tokens / (min((load.batch, *load.batches)) * mean)) + 1)
        each = min(each, max(1, len(load.order)))
        dealt = np.array(load.order)[(np.arange(n)[:, None] + n * np.arange(each)) % len(load.order)]
        sizes = lengths[dealt]
        total = sizes.sum(axis=1)
        self.first: Ints = np.concatenate([[0], np.cumsum(total)[:-1]])  # where each client's texts begin
        self.last: Ints = self.first + total
        self.start: Ints = self.first + (0 if load.together else np.arange(n) * sizes[:, 0] // n)
        flat, ends = dealt.ravel(), np.cumsum(sizes.ravel())
        index = np.arange(int(ends[-1]))
        owner = np.repeat(np.arange(len(flat)), sizes.ravel())
        self.position: Ints = index - (ends - sizes.ravel())[owner] + trace.starts[flat][owner]
        self.request: Ints = flat[owner]
        self.room: Ints = ends[owner] - index - 1  # tokens behind this one: drafts beyond them are lost
        self.kept: Ints = np.minimum(trace.accepted[self.position], self.room)
