"""A sequence sharded over context-parallel ranks such that each has the same amount of attention to compute.

With n ranks the sequence is cut into 2n chunks, and rank r holds chunks r and 2n - 1 - r. Under a causal mask later
queries see more keys. With one early and one late chunk, every rank has the same number of pairs of query and key
(as in Llama 3, arXiv 2407.21783, section 3.3.2).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nsa.ops.geometry import cached
from nsa.parallel.collectives import exchange
from nsa.parallel.grid import Axis

TOKENS = 1


@dataclass(frozen=True)
class Chunks:
    """The chunks of one rank.

    Attributes:
        axis: the context-parallel ranks. size: tokens per chunk.
    """

    axis: Axis
    size: int

    @classmethod
    def of_local(cls, tokens: int, axis: Axis) -> "Chunks":
        """From the number of tokens that one rank holds."""
        assert tokens % 2 == 0, tokens
        return cls(axis, tokens // 2)

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return 2 * self.axis.size * self.size

    def numbers(self, rank: int) -> tuple[int, int]:
        return rank, 2 * self.axis.size - 1 - rank

    def holder(self, chunk: int) -> int:
        return min(chunk, 2 * self.axis.size - 1 - chunk)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of the tokens of each of this rank's chunks."""
        return [(k * self.size, (k + 1) * self.size) for k in self.numbers(self.axis.rank)]

    def mine(self, whole: Tensor, dim: int = TOKENS) -> Tensor:
        """This rank's tokens of the whole sequence."""
        return torch.cat([whole.narrow(dim, start, self.size) for start, _ in self.spans], dim)

    def pair(self, local: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's tokens (B, 2 x size, ...) as its two chunks."""
        first, second = local.split(self.size, TOKENS)
        return first, second

    def in_order(self, gathered: Tensor) -> Tensor:
        """From tokens ordered by rank, as gathered, to tokens in the order of the sequence, (B, T, ...)."""
        parts = gathered.split(self.size, TOKENS)
        # Rank r's chunks are parts 2r and 2r + 1.
        order = range(self.axis.size)
        return torch.cat([parts[2 * r] for r in order] + [parts[2 * r + 1] for r in reversed(order)], TOKENS)

    def with_halos(self, local: Tensor, width: int, what: str) -> Tensor:
        """Each chunk preceded by its halo, the ``width`` tokens before it: (B, 2 x (width + size), ...).

        The first chunk of the sequence is preceded by zeros.
        """
        if not width:
            return local
        plan = halo_plan(self, width, local.device)
        rows = local.transpose(0, 1)  # tokens first
        received = exchange(rows[plan.rows], self.axis, plan.send, plan.receive, what)
        first, second = self.pair(local)
        known = torch.cat((received, received.new_zeros(1, *received.shape[1:])))
        halos = known[plan.order].transpose(0, 1)
        return torch.cat((halos[:, :width], first, halos[:, width:], second), TOKENS)


@dataclass(frozen=True)
class HaloPlan:
    """Which tokens each rank sends to which.

    Attributes:
        rows: (n,) int64, the local tokens to send, sorted by receiver.
        send, receive: number of tokens sent to and received from each rank.
        order: (2 x width,) int64, the index among the received tokens for each place of both halos. The index after
            the last means: no such token.
    """

    rows: Tensor
    send: list[int]
    receive: list[int]
    order: Tensor


@partial(cached, kept=None)  # a CUDA graph reads the tensors for as long as it is replayed
def halo_plan(chunks: Chunks, width: int, device: torch.device) -> HaloPlan:
    """The plan for halos of ``width`` tokens. Its index tensors are on ``device``."""
    ranks, here = range(chunks.axis.size), chunks.axis.rank

    def wanted(receiver: int, sender: int) -> list[tuple[int, int]]:
        """(place in the receiver's halos, token of the sequence) for each halo token that ``sender`` holds."""
        pairs = []
        for half, chunk in enumerate(chunks.numbers(receiver)):
            first = chunk * chunks.size - width
            for token in range(max(0, first), chunk * chunks.size):
                if chunks.holder(token // chunks.size) == sender:
                    pairs.append((half * width + token - first, token))
        return pairs

    def local(token: int) -> int:
        chunk = token // chunks.size
        return token % chunks.size + (chunks.size if chunk == chunks.numbers(here)[1] else 0)

    sent = [[local(token) for _, token in wanted(receiver, here)] for receiver in ranks]
    received = [[place for place, _ in wanted(here, sender)] for sender in ranks]
    places = [place for part in received for place in part]
    order = torch.full((2 * width,), len(places), dtype=torch.int64)
    order[torch.tensor(places, dtype=torch.int64)] = torch.arange(len(places))
    rows = torch.tensor([row for part in sent for row in part], dtype=torch.int64)
    counts = [len(part) for part in sent], [len(part) for part in received]
    return HaloPlan(rows.to(device), *counts, order.to(device))
