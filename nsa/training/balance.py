"""Load balancing of experts: scales the balance loss, updates the router biases, and measures the load."""

import torch
from torch import nn

from nsa.config import Config
from nsa.models.moe import MixtureOfExperts, moved_bias
from nsa.parallel.grid import Grid
from nsa.training.distributed import Ranks


class Balance:
    """Balances the experts of this rank's layers of ``model``; does nothing for a model without experts, nor where the
    routers are not trained.

    The objective includes, for each layer, the mean balance loss over all tokens of the global batch times
    ``model.moe.loss_weight``. The reported loss does not include it.
    """

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks, grid: Grid) -> None:
        self.moe, self.ranks = config.model.moe if config.train == "all" else None, ranks
        self.num_layers = config.model.num_layers
        self.tokens = config.training.global_batch_size * config.data.sequence_length
        self.here: dict[int, MixtureOfExperts] = {}
        for number, layer in enumerate(model.layers):  # type: ignore[arg-type]
            mlp = getattr(layer, "mlp", None)  # the layer may be on another stage
            if isinstance(mlp, MixtureOfExperts):
                self.here[number] = mlp
                mlp.balance.scale = grid.replicas.size / self.tokens  # DeepSpeed averages over the replicas

    @torch.no_grad()
    def end_step(self, update: bool) -> dict[str, float]:
        """Update the biases by the load of the global batch, identically on all ranks. Collective.

        Args:
            update: false if the step was skipped: then the biases stay.

        Returns:
            Metrics of the layers that have experts. Tags end in the layer's number:
            moe/max_violation: tokens of the busiest expert over the mean, minus 1 (MaxVio of arXiv 2408.15664).
            moe/mean_violation: mean distance of an expert's tokens from the mean, over the mean.
            moe/dead_share: share of experts without a token.
            moe/balance_loss: if it has a weight; 1 is an even load.
        """
        if self.moe is None:
            return {}
        # Counts are exact in fp64, so their sum is the same in any order.
        seen = torch.zeros(self.num_layers, self.moe.num_experts + 1, dtype=torch.float64, device=self.ranks.device)
        for number, mlp in self.here.items():
            if mlp.balance.tally is not None:  # None before the first backward pass
                seen[number] += mlp.balance.tally
            mlp.balance.clear()
        self.ranks.sum(seen)
        if update and self.moe.bias_rate:
            for number, mlp in self.here.items():
                load = seen[number, 1:].to(torch.int64)
                mlp.router.bias.copy_(moved_bias(mlp.router.bias, load, self.moe.bias_rate))
        return self._figures(seen.cpu())

    def _figures(self, seen: torch.Tensor) -> dict[str, float]:
        assert self.moe is not None
        load = seen[self.moe.first_dense :, 1:]
        relative = load / load.mean(1, keepdim=True)
        figures = {
            "max_violation": relative.amax(1) - 1,
            "mean_violation": (relative - 1).abs().mean(1),
            "dead_share": (load == 0).double().mean(1),
        }
        if self.moe.loss_weight:
            figures["balance_loss"] = seen[self.moe.first_dense :, 0] / self.tokens
        return {
            f"moe/{name}/layer_{self.moe.first_dense + i:02d}": value
            for name, values in figures.items()
            for i, value in enumerate(values.tolist())
        }
