"""The auxiliary losses of attention layers, such as that of DSA's indexer: scales and metrics."""

import torch
from torch import Tensor, nn

from nsa.config import Config
from nsa.layers.auxiliary_loss import AuxiliaryLoss
from nsa.parallel.grid import Grid
from nsa.training.distributed import Ranks
from nsa.training.freezing import has_loss


class AttentionLosses:
    """The losses of this rank's layers of ``model`` (`nsa.layers.kind.Kind.loss`), where they are computed.

    The objective includes, for each layer, the mean loss over all tokens of the global batch times its weight. The
    reported loss of the model does not include it.
    """

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks, grid: Grid) -> None:
        self.ranks = ranks
        self.tokens = config.training.global_batch_size * config.data.sequence_length
        kinds = config.attention.kinds(config.model.num_layers)
        self.names = {n: kind.loss[1] for n, kind in enumerate(kinds) if kind.loss and has_loss(kind, config)}
        self.here: dict[int, AuxiliaryLoss] = {}
        for number, layer in enumerate(model.layers):  # type: ignore[arg-type]
            if number not in self.names or not hasattr(layer, "attention"):  # the layer may be on another stage
                continue
            loss = layer.attention.get_submodule(layer.kind.loss[0])
            assert isinstance(loss, AuxiliaryLoss)
            loss.scale = grid.replicas.size / self.tokens  # DeepSpeed averages over the replicas
            self.here[number] = loss

    def take(self) -> Tensor:
        """The sum of the losses of this rank's layers since the last call, as the objective has it: a scalar, without
        a gradient if there were none. For a model of which nothing else is trained."""
        kept = [loss for loss in (each.take() for each in self.here.values()) if loss is not None]
        return torch.stack(kept).sum() if kept else torch.zeros((), device=self.ranks.device)

    @torch.no_grad()
    def end_step(self) -> dict[str, float]:
        """As `means`; the next step begins."""
        means = self.means()
        for loss in self.here.values():
            loss.clear()
        return means

    @torch.no_grad()
    def means(self) -> dict[str, float]:
        """The mean of each loss over the tokens of the global batch, as attention/<name>/layer_<number>. Collective."""
        if not self.names:
            return {}
        seen = torch.zeros(max(self.names) + 1, dtype=torch.float64, device=self.ranks.device)
        for number, loss in self.here.items():
            if loss.tally is not None:  # None before the first backward pass
                seen[number] += loss.tally[0]
        self.ranks.sum(seen)
        means = (seen / self.tokens).tolist()
        return {f"attention/{name}/layer_{number:02d}": means[number] for number, name in self.names.items()}
