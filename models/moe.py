"""Mixture of experts: fine-grained routed experts beside shared ones (DeepSeekMoE, arXiv 2401.06066, section 3).

    y_t = shared(u_t) + sum_{i chosen} g_{i,t} expert_i(u_t)

Every token gets its experts: none is dropped, and experts have no capacity limit. Sizes in the comments: B sequences,
T tokens, C hidden size, E experts, K experts per token, F width of an expert.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

from nsa.layers.auxiliary_loss import AuxiliaryLoss
from nsa.models.config import MoEConfig
from nsa.ops.dispatch import without_autocast


class Router(nn.Module):
    """Selects the experts of a token and their gates (DeepSeek-V3, arXiv 2412.19437, Eq. 13 to 16).

        s_{i,t} = sigmoid(u_t . e_i)      chosen_t = TopK_i(s_{i,t} + b_i)      g_{i,t} = s_{i,t} / sum_{chosen} s_{j,t}

    The bias b balances the load without a loss (arXiv 2408.15664): it affects the selection only and has no gradient.
    The trainer updates it once per step (`moved_bias`). It stays fp32 in any dtype of the weights, since its steps are
    small.
    """

    bias: Tensor

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., C) -> affinities s (..., E) and gates (..., K), fp32 (or more); experts (..., K) int64.

        Of equal affinities the expert with the lower number is selected.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device.type):  # a choice is made in fp32
            affinities = (x.to(dtype) @ self.weight.to(dtype).mT).sigmoid()
        ranked = (affinities.detach() + self.bias).sort(dim=-1, descending=True, stable=True).indices
        chosen = ranked[..., : self.top_k]
        gates = affinities.gather(-1, chosen)
        return affinities, chosen, gates / (gates.sum(-1, keepdim=True) + 1e-20)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        before = self.bias
        super()._apply(fn, recurse)
        self.bias = self.bias.float() if before.is_meta else before.to(self.bias.device)
        return self


class Experts(nn.Module):
    """E SwiGLU MLPs, each applied to its own rows.

    gate, up (E, C, F); down (E, F, C): ``down(silu(gate(x)) * up(x))`` as in the dense layer.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.up = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.down = nn.Parameter(torch.empty(num_experts, expert_size, hidden_size))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows (M, C), the first ``counts[0]`` for expert 0, the next for expert 1 ...; counts (E,) int64 -> (M, C)."""
        if self._grouped(rows):
            ends = counts.cumsum(0).to(torch.int32)
            hidden = silu(grouped_mm(rows, self.gate, offs=ends)) * grouped_mm(rows, self.up, offs=ends)
            return grouped_mm(hidden, self.down, offs=ends)
        # Experts without rows take part, too, so that every weight has a gradient on every rank.
        parts = zip(
            rows.split(sizes(counts, len(rows))), self.gate.unbind(), self.up.unbind(), self.down.unbind(), strict=True
        )
        return torch.cat([(silu(x @ gate) * (x @ up)) @ down for x, gate, up, down in parts])

    def _grouped(self, rows: Tensor) -> bool:
        """Whether one kernel can compute all experts for these rows."""
        return rows.is_cuda and rows.dtype == torch.bfloat16 and self.one_kernel(*self.gate.shape[1:]) and len(rows) > 0

    @staticmethod
    def one_kernel(hidden_size: int, expert_size: int) -> bool:
        """Whether one bf16 GPU kernel can compute all experts of these sizes; it needs rows of n x 16 bytes."""
        return hidden_size % 8 == expert_size % 8 == 0


class MixtureOfExperts(nn.Module):
    """x (B, T, C) -> (B, T, C).

    Args:
        shared: an MLP that is applied to every token; None: there is none.

    Attributes:
        balance: the balance loss; its tally also counts the tokens of each expert.
        row_counts: (B, E) int64 counts of these tokens -> counts of the whole sequences. Parallelism replaces it if
            ranks share the tokens of a sequence.
    """

    def __init__(self, hidden_size: int, config: MoEConfig, shared: nn.Module | None) -> None:
        super().__init__()
        self.router = Router(hidden_size, config.num_experts, config.top_k)
        self.experts = Experts(config.num_experts, hidden_size, config.expert_size)
        self.shared = shared
        self.balance = AuxiliaryLoss(config.loss_weight)
        self.row_counts: Callable[[Tensor], Tensor] = lambda counts: counts

    def forward(self, x: Tensor) -> Tensor:
        affinities, chosen, gates = self.router(x)
        counts = expert_counts(chosen, affinities.shape[-1])
        order = chosen.flatten().argsort(stable=True)
        inverse = order.argsort()
        rows = take(x.flatten(0, 1), order, inverse, copies=self.router.top_k)
        out = take(self.experts(rows, counts.sum(0)), inverse, order).unflatten(0, (*gates.shape,))  # (B, T, K, C)
        y = (gates.to(x.dtype).unsqueeze(-2) @ out).squeeze(-2)
        if self.shared is not None:
            y = y + self.shared(x)
        loss = None
        if y.requires_grad and self.balance.weight:
            loss = balance_losses(affinities, self.row_counts(counts.clone())).sum()
        return self.balance(y, loss, affinities.shape[0] * affinities.shape[1], counts.sum(0))


def expert_counts(chosen: Tensor, num_experts: int) -> Tensor:
    """chosen (B, T, K) -> (B, E) int64: how many tokens of each sequence go to each expert."""
    ids = chosen.flatten(1).sort(dim=1).values
    numbers = torch.arange(num_experts, device=ids.device).expand(len(ids), -1).contiguous()
    return torch.searchsorted(ids, numbers, right=True).diff(dim=1, prepend=ids.new_zeros(len(ids), 1))


def sizes(counts: Tensor, total: int) -> list[int]:
    """``counts``, whose sum is ``total``, on the host. On the meta device, which has no data: as even as possible."""
    return even(total, len(counts)) if counts.is_meta else counts.tolist()


def even(total: int, parts: int) -> list[int]:
    """``parts`` numbers with the sum ``total``, which differ by one at most."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def balance_losses(affinities: Tensor, counts: Tensor) -> Tensor:
    """The balance loss of each token; its mean over a sequence is that of the sequence (DeepSeek-V3, Eq. 17 to 20).

        sum_i f_i P_i,   f_i = E / (K T) x (tokens that chose i),   P_i = 1 / T sum_t s_{i,t} / sum_j s_{j,t}

    It is 1 if the load is even. f has no gradient. Unlike in Eq. 18, f counts the selection with the bias, which is the
    actual load.

    Args:
        affinities: (B, T, E). counts: (B, E) int64 of the whole sequences.

    Returns:
        (B, T), each token's part of the sum over tokens.
    """
    shares = affinities / affinities.sum(-1, keepdim=True)
    f = affinities.shape[-1] * counts / counts.sum(-1, keepdim=True)
    with without_autocast(shares.device.type):
        return (shares @ f.to(shares.dtype).unsqueeze(-1)).squeeze(-1)


def moved_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """b_i + rate x sign(mean load - load_i) (arXiv 2408.15664, algorithm 1). bias (E,) fp32; load (E,) int64."""
    above = load * len(load) - load.sum()  # E times the excess, without rounding
    return bias - rate * above.sign().to(bias.dtype)


def take(rows: Tensor, index: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
    """Repeat each of rows (M, C) ``copies`` times and permute them by ``index`` (M x copies,).

    With its ``inverse`` the gradient is a gather and a sum in a fixed order, which is deterministic.
    """
    return _Take.apply(rows, index, inverse, copies)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return rows[index // copies if copies > 1 else index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        gradient = gradient[inverse]
        return gradient.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else gradient, None, None, None
