"""FLOPs and MFU against independent counts: pairs of queries and keys in the naive masks, weights by name."""

from types import SimpleNamespace

import pytest
import torch

from nsa import ops
from nsa.layers.kinds import kind_of
from nsa.layers.nsa.config import NsaConfig
from nsa.layers.projections.config import MlaConfig
from nsa.models import AttentionConfig, Decoder, ModelConfig, MoEConfig, training_flops_per_token
from nsa.models.sizes import attention_flops
from nsa.ops import compressed, dense, selected
from nsa.ops.geometry import Documents, num_compressed
from nsa.training import performance
from nsa.training.metrics import StepMetrics, StepResult
from nsa.training.performance import PEAK_FLOPS, peak_flops

TOKENS = 100
# All numbers differ, so that the tests notice if two are swapped.
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_layers": 5,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "v_head_dim": 4,
    "intermediate_size": 40,
    "max_position": 128,
}
LENGTH, STRIDE, BLOCK, BLOCKS, WINDOW = 8, 4, 12, 5, 17
ATTENTION = NsaConfig(
    compress_length=LENGTH,
    compress_stride=STRIDE,
    compress_hidden=7,
    block_size=BLOCK,
    num_blocks=BLOCKS,
    num_initial=1,
    num_local=2,
    window=WINDOW,
)


def pairs(kind: str) -> int:
    """(query, key) pairs of one head over a sequence of TOKENS: the True entries of each branch's naive mask."""
    documents = Documents.of(TOKENS, 0, None, torch.device("cpu"))
    if kind == "dense":
        return int(dense.naive_mask(documents, TOKENS, TOKENS).sum())
    blocks, sizes = num_compressed(TOKENS, LENGTH, STRIDE), {"length": LENGTH, "stride": STRIDE}
    torch.manual_seed(0)
    q, k, v = torch.randn(1, TOKENS, 6, 8), torch.randn(1, blocks, 2, 8), torch.randn(1, blocks, 2, 4)
    _, lse = ops.compressed_attention(q, k, v, **sizes, backend="naive")
    chosen = ops.select_blocks(
        q, k, lse, **sizes, block_size=BLOCK, num_blocks=BLOCKS, num_initial=1, num_local=2, backend="naive"
    )
    listed = selected.naive_mask(documents, chosen, TOKENS, BLOCK)[0].sum((1, 2))
    assert listed[0] == listed[1], "which blocks are chosen does not change how many tokens are seen"
    seen = int(compressed.naive_mask(documents, blocks, LENGTH, STRIDE).sum())
    return seen + int(listed[0]) + int(dense.naive_mask(documents, TOKENS, WINDOW).sum())


@pytest.mark.parametrize("kind", ["dense", "nsa"])
def test_flops_of_attention_equal_the_pairs_in_its_masks(kind: str) -> None:
    """Fails for a pair too many or too few in any branch: at its first token, a block boundary, or the last token."""
    model, attention = ModelConfig(**SHAPE), AttentionConfig(kind=kind, nsa=ATTENTION)
    flops = attention_flops(kind_of(kind), model, attention, TOKENS)
    # A pair is a multiply-add for each column of the key and of the value, in every head.
    assert flops * TOKENS == pytest.approx(2 * 6 * (8 + 4) * pairs(kind), rel=1e-12)


MOE = MoEConfig(num_experts=4, top_k=2, num_shared=1, expert_size=11, first_dense=2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("moe", [None, MOE])
@pytest.mark.parametrize("kind", ["dense", "nsa", ["dense", "nsa", "nsa"]])
def test_flops_per_token_are_three_forward_passes(kind: str | list[str], moe: MoEConfig | None, tied: bool) -> None:
    """Fails if a weight is missing, is counted though no token uses it, or a layer has the other kind."""
    model, attention = ModelConfig(**SHAPE, moe=moe, tie_embeddings=tied), AttentionConfig(kind=kind, nsa=ATTENTION)
    flops = training_flops_per_token(model, attention, TOKENS)
    for name, kinds in (("sparse", [k.name for k in attention.kinds(5)]), ("dense_equivalent", ["dense"] * 5)):
        with torch.device("meta"):
            decoder = Decoder(model, attention.model_copy(update={"kind": kinds}))
        products = sum(times(n) * p.numel() for n, p in decoder.named_parameters())
        scores = sum(2 * 6 * (8 + 4) * pairs(kind) / TOKENS for kind in kinds)
        # Each forward product has two of its size in the backward pass.
        assert flops[name] == pytest.approx(3 * (2 * (products + 97 * 24) + scores), rel=1e-12)


@pytest.mark.parametrize("phase", ["sparse", "warm-up"])
@pytest.mark.parametrize("compression", ["mlp", "pooled"])
def test_flops_of_taught_selection(compression: str, phase: str) -> None:
    """The gate of pooled keys is of every token, their matrix of every block. In the warm-up queries see all tokens."""
    model = ModelConfig(**SHAPE)
    nsa = ATTENTION.model_copy(update={"key_compression": compression, "phase": phase})
    attention = AttentionConfig(kind="nsa", nsa=nsa)
    with torch.device("meta"):
        decoder = Decoder(model, attention)
    products = sum(times(n) * p.numel() for n, p in decoder.named_parameters())
    scores = 5 * 2 * 6 * (8 + 4) * pairs("nsa" if phase == "sparse" else "dense") / TOKENS
    flops = training_flops_per_token(model, attention, TOKENS)["sparse"]
    assert flops == pytest.approx(3 * (2 * (products + 97 * 24) + scores), rel=1e-12)


@pytest.mark.parametrize("q_lora_rank", [None, 9])
@pytest.mark.parametrize("phase", ["dense", "sparse", "warm-up"])
def test_flops_of_latent_attention(phase: str, q_lora_rank: int | None) -> None:
    """Scores of the absorbed form are as wide as the latent; its products are those of the expanded form."""
    mla = MlaConfig(q_lora_rank=q_lora_rank, kv_lora_rank=13, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=4)
    model = ModelConfig(**SHAPE | {"num_kv_heads": 6}, projection="mla", mla=mla)
    sizes = {"topk": 7, "index_heads": 3, "index_head_dim": 10, "index_rotary_dims": 2}
    if phase != "dense":
        sizes["phase"] = phase
    attention = AttentionConfig(kind="dense" if phase == "dense" else "dsa", dsa=sizes)
    with torch.device("meta"):
        decoder = Decoder(model, attention)
    products = sum(times(name) * p.numel() for name, p in decoder.named_parameters())
    causal = TOKENS * (TOKENS + 1) / 2
    pair, seen, index = 8 + 4, causal, 0.0 if phase == "dense" else 2 * 3 * 10 * causal
    if phase == "sparse":
        pair, seen = 13 + 2 + 13, sum(min(7, t + 1) for t in range(TOKENS))
    scores = 5 * (2 * 6 * pair * seen + index) / TOKENS
    flops = training_flops_per_token(model, attention, TOKENS)["sparse"]
    assert flops == pytest.approx(3 * (2 * (products + 97 * 24) + scores), rel=1e-12)


def times(name: str) -> float:
    """Multiply-adds per token with each element of a parameter; biases and positions are added, not multiplied.

    The embedding is looked up. The head is counted separately, since it may share the embedding's weight.
    """
    if "norm" in name or name in ("embedding.weight", "head.weight") or name.endswith(("bias", "position")):
        return 0
    if ".experts." in name:
        return 2 / 4
    if name.endswith(".compress.key.gate.weight"):
        return 2  # two KV heads
    return 2 / STRIDE if ".compress." in name else 1  # and a block every STRIDE tokens


def test_mfu_is_flops_and_speed_over_all_devices() -> None:
    """Fails if the MFU ignores the ranks, counts them twice, or uses another speed than the logged one."""
    figures = SimpleNamespace(
        tokens_per_step=4096,
        ranks=SimpleNamespace(device=torch.device("cpu"), world_size=4),
        flops={"sparse": 3e9, "dense_equivalent": 5e9},
        peak=200e12,
    )
    result = StepResult(
        loss=2.0, grad_norm=1.0, learning_rate=0.1, skipped=False, data_seconds=0.0, stop=0, sent={}, figures={}
    )
    logged = StepMetrics.of(figures, result, 7, 5, seconds=0.5, data_seconds=0.125)
    assert logged["perf/tokens_per_second"] == 8192 and logged["perf/step_seconds"] == 0.5
    assert logged["perf/data_seconds"] == 0.125
    assert logged["train/tokens"] == 28672 and logged["train/skipped_steps"] == 2
    assert logged["perf/mfu_sparse"] == pytest.approx(3e9 * 8192 / (4 * 200e12), rel=1e-12)
    assert logged["perf/mfu_dense_equivalent"] == pytest.approx(5e9 * 8192 / (4 * 200e12), rel=1e-12)


# Dense bf16 TFLOP/s in NVIDIA's data sheets, by the names that the driver gives. Most sheets print the figure with
# sparsity, which is twice as much.
PEAKS = {
    "NVIDIA B300 SXM6 AC": 2250,  # HGX B300: 36 PFLOP/s with sparsity of eight
    "NVIDIA B200": 2250,  # DGX B200: 72 PFLOP/s in FP8 with sparsity of eight, half of it in bf16
    "NVIDIA GH200 480GB": 989,  # Grace Hopper: 1979 with sparsity
    "NVIDIA H200": 989,  # H200 Tensor Core GPU, SXM: 1979 with sparsity
    "NVIDIA H200 NVL": 835,  # H200 NVL: 1671 with sparsity
    "NVIDIA H100 80GB HBM3": 989,  # H100 Tensor Core GPU, SXM: 1979 with sparsity
    "NVIDIA H100 PCIe": 756,  # H100 PCIe: 1513 with sparsity
    "NVIDIA H100 NVL": 835,  # H100 NVL: 1671 with sparsity
    "NVIDIA H800": 989,  # H100's chip with slower links
    "NVIDIA H20": 148,
    "NVIDIA A100-SXM4-80GB": 312,  # A100 Tensor Core GPU: 312, 624 with sparsity
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A800-SXM4-80GB": 312,  # A100's chip with slower links
    "NVIDIA L40S": 362,  # L40S: 362, 733 with sparsity
    "NVIDIA L4": 121,  # L4: 242 with sparsity
    "NVIDIA A10G": 70,  # A10G: 70, 140 with sparsity
    "NVIDIA A10": 125,  # A10: 125, 250 with sparsity
    "NVIDIA GeForce RTX 4090": 165,  # Ada architecture paper: 165.2 with fp32 accumulation
    "NVIDIA GeForce RTX 3090": 71,  # GA102 architecture paper: 71 with fp32 accumulation
}


@pytest.mark.parametrize("name", PEAKS)
def test_peak_flops_equal_the_data_sheet(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails for another number, or if an earlier entry matches the name: A10 in A100, H20 in H200, L4 in L40S."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), "bf16") == (PEAKS[name] * 1e12, "data sheet")


def test_every_peak_is_pinned() -> None:
    """Fails for an entry of the table that no name above matches."""
    reached = {next(part for part, _ in PEAK_FLOPS if part in name) for name in PEAKS}
    assert reached == {part for part, _ in PEAK_FLOPS}


def test_peak_without_a_data_sheet_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if fp32 gets the peak of bf16."""
    monkeypatch.setattr(performance, "_measured_flops", lambda device, dtype: {torch.float32: 1.0}.get(dtype, 2.0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(torch.device("cuda", 0), "fp32") == (1.0, "measured")


# Other GPUs, whose names contain that of a GPU above.
UNKNOWN = ["NVIDIA T4", "NVIDIA L40", "NVIDIA GB200", "NVIDIA GB300", "NVIDIA RTX A1000", "NVIDIA A100X", "NVIDIA A10M"]
UNKNOWN += ["NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_similar_names_do_not_match(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails for a match with a part of a word: L4 in L40, B200 in GB200, A100 in A1000."""
    monkeypatch.setattr(performance, "_measured_flops", lambda device, dtype: 2.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), "bf16") == (2.0, "measured")
