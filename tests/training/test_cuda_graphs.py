"""A micro batch that is replayed from CUDA graphs computes what the decoder computes."""

import json

import pytest
import torch

from nsa.layers.auxiliary_loss import AuxiliaryLoss
from nsa.layers.dsa.config import DsaConfig
from nsa.layers.nsa.config import NsaConfig
from nsa.models import AttentionConfig, Decoder, ModelConfig
from nsa.models.config import MoEConfig
from nsa.ops.geometry import KnownLengths
from nsa.training import cuda_graphs
from nsa.training.cuda_graphs import (
    FEWEST_DOCUMENTS,
    GraphedDecoder,
    documents_size,
    graphs_serve,
    pad_borders,
)
from nsa.training.memory import out_of_memory_behind
from tests.training.tiny import tiny_config, train

GPU = torch.device("cuda")
EXPERTS = ("model.moe.num_experts=8", "model.moe.top_k=2", "model.moe.expert_size=16")

# The loss looks at queries that are drawn: a replay draws what the pass draws.
TAUGHT = ("attention.nsa.kl_weight=1", "attention.nsa.kl_stride=2")


def test_borders_are_filled_up_with_empty_documents():
    borders = torch.tensor([0, 3, 10], dtype=torch.int32)
    assert pad_borders(borders, 6).tolist() == [0, 3, 10, 10, 10, 10] and pad_borders(borders, 6).dtype == torch.int32
    assert pad_borders(borders, 3).tolist() == [0, 3, 10]
    assert documents_size(2) == documents_size(FEWEST_DOCUMENTS) == FEWEST_DOCUMENTS
    assert documents_size(FEWEST_DOCUMENTS + 1) == 2 * FEWEST_DOCUMENTS


def test_where_graphs_serve(tmp_path):
    def serve(*overrides: str, device: torch.device = GPU) -> bool:
        return graphs_serve(tiny_config(tmp_path, *overrides), device)

    assert serve() and serve("engine.zero_stage=2") and not serve(device=torch.device("cpu"))
    assert serve("parallel.context=2", "parallel.tensor=2")
    for override in ("engine.cuda_graphs=false", "engine.zero_stage=3", "parallel.pipeline=2"):
        assert not serve(override), override
    assert serve("attention.kind=dsa", "attention.dsa.topk=8") and not serve("attention.kind=entmax")
    assert serve("attention.nsa.kl_weight=1")
    assert serve(*EXPERTS, "engine.precision=bf16") and serve(*EXPERTS, "engine.precision=bf16", "parallel.context=2")
    assert not serve(*EXPERTS, "engine.precision=fp32"), "a kernel for each expert"
    assert not serve(*EXPERTS, "engine.precision=bf16", "model.moe.expert_size=12")
    assert not serve(*EXPERTS, "engine.precision=bf16", "parallel.tensor=2")


def test_memory_that_ran_out_is_said_where_the_end_of_the_recording_fails_too():
    def run() -> None:
        try:
            raise torch.OutOfMemoryError("tried to allocate")
        finally:
            raise RuntimeError("capturing stream has unjoined work")

    with pytest.raises(RuntimeError, match="unjoined") as caught:
        run()
    assert str(out_of_memory_behind(caught.value)) == "tried to allocate"
    assert out_of_memory_behind(RuntimeError("something else")) is None


def test_a_recording_is_for_documents_of_one_length_until_some_differ(monkeypatch):
    """A model without dense layers asks for no lengths, and records once. Borders of a device are stood for by those of
    the host, which are known."""
    made = []

    class Recording:
        def __init__(self, decoder, ids, targets, borders, lengths):
            made.append(lengths)
            self.inputs, self.lengths = (ids, targets, borders), lengths

        has_room = cuda_graphs._Recording.has_room

    monkeypatch.setattr(cuda_graphs, "_Recording", Recording)
    monkeypatch.setattr(cuda_graphs._Replay, "apply", lambda recording, *_: recording.lengths)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16}
    config = ModelConfig(vocab_size=8, intermediate_size=16, max_position=64, **sizes)
    ids, whole = torch.zeros(1, 64, dtype=torch.int64), KnownLengths(64, True)

    def records(kind: str, *batches: list[int]) -> list:
        made.clear()
        graphed = GraphedDecoder(Decoder(config, AttentionConfig(kind=kind)))
        for lengths in batches:
            graphed(ids, targets=ids, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int())
        return list(made)

    assert records("dense", [64], [64]) == [whole]
    assert records("dense", [64], [60, 4], [64], [1, 63]) == [whole, None], "for good"
    assert records("dense", [60, 4], [64]) == [None]
    assert records("dense", [32, 32], [64]) == [KnownLengths(32, True), None]
    assert records("nsa", [64], [60, 4], [64]) == [None]


def packed(lengths: list[int], generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    tokens = sum(lengths)
    ids, targets = (torch.randint(64, (1, tokens), device="cuda", generator=generator) for _ in range(2))
    return ids, targets, torch.tensor([0, *lengths], device="cuda").cumsum(0).int()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "experts", "kl_weight"),
    [("nsa", False, 0), ("nsa", False, 1), ("dense", False, 0), ("dense", True, 0), ("dsa", False, 0)],
)
def test_losses_and_gradients_have_the_bits_of_the_decoder(kind, experts, kl_weight):
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=8, top_k=2, expert_size=64, loss_weight=0.1) if experts else None
    sizes = {"hidden_size": 128, "num_layers": 2, "num_heads": 8, "num_kv_heads": 1, "head_dim": 64}
    config = ModelConfig(vocab_size=64, intermediate_size=256, max_position=4096, moe=moe, **sizes)
    with torch.device("cuda"):
        dsa = DsaConfig(topk=256, index_heads=4, index_head_dim=64)
        nsa = NsaConfig(num_blocks=8, window=128, kl_weight=kl_weight)
        attention = AttentionConfig(kind=kind, dsa=dsa, nsa=nsa)
        model = Decoder(config, attention, dense_attention="triton").bfloat16()
    auxiliary = [module for module in model.modules() if isinstance(module, AuxiliaryLoss)]
    assert len(auxiliary) == (2 if kind == "dsa" or kl_weight else experts * 1)
    graphed = GraphedDecoder(model)
    generator = torch.Generator("cuda").manual_seed(1)
    # Few documents, others, more than there was room for, few again; the third has other shapes.
    many = [8] * 90 + [1328]
    for lengths in ([2048], [1000, 1, 47, 1000], [512, 512], many, [3, 2045]):
        ids, targets, borders = packed(lengths, generator)
        weights = torch.rand(1, sum(lengths), device="cuda", generator=generator)
        found = []
        for forward in (model.forward, graphed, graphed):
            model.zero_grad(set_to_none=True)
            for loss in auxiliary:
                loss.clear()
            losses = forward(ids, targets=targets, cu_seqlens=borders)
            (losses * weights).sum().backward()
            found.append([losses.detach(), *(p.grad for p in model.parameters())])
            found[-1] += [loss.tally.clone() for loss in auxiliary]
        for a, b, again in zip(*found, strict=True):
            assert torch.equal(a, b) and torch.equal(a, again)
    kept = [p.grad.clone() for p in model.parameters()]
    (graphed(ids, targets=targets, cu_seqlens=borders) * weights).sum().backward()  # adds to what is there
    for p, once in zip(model.parameters(), kept, strict=True):
        assert torch.equal(p.grad, once + once)
    with torch.no_grad():
        assert torch.equal(graphed(ids, targets=targets, cu_seqlens=borders), losses)
        assert graphed(ids).shape == (1, 2048, 64), "logits, too"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("recomputed", "zero", "experts", "taught"),
    [
        ("none", 0, False, False),
        ("none", 1, True, False),
        ("selective", 2, False, False),
        ("full", 1, True, False),
        ("none", 1, False, True),
        ("full", 1, False, True),
    ],
)
def test_a_run_with_graphs_has_the_losses_of_one_without(tmp_path, recomputed, zero, experts, taught):
    curves = []
    for graphs in ("true", "false"):
        (tmp_path / graphs).mkdir()
        overrides = ["engine.precision=bf16", f"engine.activation_checkpointing={recomputed}", "attention.kind=nsa"]
        overrides += [f"engine.cuda_graphs={graphs}", f"engine.zero_stage={zero}", "training.global_batch_size=4"]
        overrides += [*EXPERTS, "model.moe.bias_rate=0.01"] if experts else []
        overrides += TAUGHT if taught else []
        result = train(tmp_path / graphs, *overrides)
        assert result.returncode == 0, result.stdout
        lines = (tmp_path / graphs / "runs/run/metrics.jsonl").read_text().splitlines()
        names = ("train/loss", "train/grad_norm", "validation/loss")
        steps = [json.loads(line).items() for line in lines]
        curves.append([{k: v for k, v in line if k in names or k.startswith(("moe/", "attention/"))} for line in steps])
    assert curves[0] == curves[1] and len(curves[0]) >= 6
