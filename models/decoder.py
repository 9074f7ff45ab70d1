"""The decoder: pre-norm layers of attention and SwiGLU (the shape of Llama, arXiv 2302.13971)."""

import torch
from torch import Tensor, nn

from nsa.cache import Cache
from nsa.layers.kind import Backends, Kind
from nsa.layers.linear import Linear, swiglu_linear
from nsa.layers.norm import RMSNorm
from nsa.layers.rotary import Rotary, RotaryTables
from nsa.models.config import AttentionConfig, ModelConfig, check_projection
from nsa.models.head import LanguageModelHead
from nsa.models.initialisation import first_value
from nsa.models.moe import MixtureOfExperts
from nsa.ops.geometry import Documents


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        # Modules give names and initialisation to the weights; one operator uses both.
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu_linear(x, self.gate.weight, self.up.weight))


class DecoderLayer(nn.Module):
    """Attention and MLP. Each reads the normed residual stream and adds to the stream. ``kind``: of the attention."""

    def __init__(self, config: ModelConfig, kind: Kind, attention: nn.Module, mlp: MLP | MixtureOfExperts) -> None:
        super().__init__()
        self.kind = kind
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = mlp

    def forward(
        self, x: Tensor, rotary: RotaryTables, cu_seqlens: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        x, normed = self.attention_norm(x)
        x, normed = self.mlp_norm(x, self.attention(normed, rotary, cu_seqlens, cache))
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """A decoder language model, initialised by torch's generator; on the meta device without values.

    Args:
        config: shape. attention: kind of each layer, and the sizes of each kind.
        backend: implementation of the attention operators: auto, triton, torch or naive.
        dense_attention: implementation of dense attention if ``backend`` is auto: auto, triton or a library
            (`nsa.ops.dense_attention`).

    Raises:
        ValueError: a kind of attention does not have an option of the projection.
    """

    def __init__(
        self, config: ModelConfig, attention: AttentionConfig, *, backend: str = "auto", dense_attention: str = "auto"
    ) -> None:
        super().__init__()
        check_projection(config, attention)
        self.config, self.attention = config, attention
        rope = config.rope
        self.rotary = Rotary(
            rope.theta,
            config.max_position,
            rope.yarn_factor,
            rope.yarn_beta_fast,
            rope.yarn_beta_slow,
            config.rope_scaling,
        )
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        built: dict[str, list[nn.Module]] = {}  # the layers of each kind
        for number, kind in enumerate(attention.kinds(config.num_layers)):
            before = built.setdefault(kind.name, [])
            backends = Backends(backend, dense_attention)
            before.append(kind.build(config.attention_shape, attention.of(kind), backends, before))
            self.layers.append(DecoderLayer(config, kind, before[-1], build_mlp(number, config)))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = LanguageModelHead(config.hidden_size, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        if not self.embedding.weight.is_meta:
            self.initialise(seed=int(torch.randint(2**62, (), device="cpu")))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Give every parameter its `first_value`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(first_value(name, parameter.shape, self.config, seed, parameter.device))

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        caches: list[Cache] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits, or the loss of each token.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the next token of each; -100 is not counted.
            cu_seqlens: (N+1,) int32 boundaries of packed documents, with B = 1; positions start at 0 in each.
            caches: of the tokens before, from `new_caches`; the T new tokens are appended.
            positions: (T,) int64, of each token in its document; None: from ``cu_seqlens`` and ``caches``.

        Returns:
            Without targets: logits (B, T, V). With: negative log-likelihood (B, T) fp32 in nats, 0 where not counted.
        """
        if positions is None:
            offset = caches[0].length if caches else 0
            positions = Documents.of(input_ids.shape[1], offset, cu_seqlens, input_ids.device).query_local
        rotary = self.rotary.at(positions)
        x = self.embedding(input_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, cu_seqlens, caches[i] if caches else None)
        return self.head(self.norm(x)[1], targets)

    def new_caches(self) -> list[Cache]:
        """Empty caches, one per layer, for decoding a batch of sequences of equal length."""
        return [layer.attention.new_cache() for layer in self.layers]  # type: ignore[union-attr, operator]


def build_mlp(layer: int, config: ModelConfig) -> MLP | MixtureOfExperts:
    """The MLP of one decoder layer. Shared experts are one MLP of their total width."""
    moe = config.moe
    if moe is None or not config.has_experts(layer):
        return MLP(config.hidden_size, config.intermediate_size)
    shared = MLP(config.hidden_size, moe.num_shared * moe.expert_size) if moe.num_shared else None
    return MixtureOfExperts(config.hidden_size, moe, shared)
