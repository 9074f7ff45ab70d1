"""The exported model against the decoder it is exported from, and decoding with its cache against none."""

import random

import pytest
import torch

from nsa import ops
from nsa.layers.csa.config import CsaConfig
from nsa.layers.dsa.config import DsaConfig
from nsa.layers.entmax.config import EntmaxConfig
from nsa.layers.kinds import KINDS
from nsa.layers.nsa.config import NsaConfig
from nsa.layers.rotary_scaling import RopeScaling
from nsa.models import AttentionConfig, Decoder, ModelConfig, MoEConfig, RopeConfig, hf
from nsa.models.hf import attention_nsa
from nsa.models.hf.cache_nsa import ChosenTokens, Step
from nsa.models.hf.configuration_nsa import NSAConfig
from nsa.models.hf.modeling_nsa import NSAForCausalLM

VOCABULARY = 97
# heads, KV heads, head dim, value dim
SHAPES = [(4, 1, 8, 8), (6, 3, 8, 6), (4, 4, 6, 10)]
# compress length, stride, block size, blocks, initial, local, window
SIZES = [(8, 4, 8, 4, 1, 2, 12), (8, 2, 16, 3, 0, 1, 5), (4, 4, 12, 5, 2, 0, 1), (16, 4, 16, 2, 1, 1, 200)]
# tokens, initial, local, heads, head dim, rotated dims, which, pairs
INDEXERS = [
    (9, 0, 0, 3, 8, 4, "first", "half-split"),
    (7, 2, 3, 2, 6, 6, "first", "interleaved"),
    (20, 0, 1, 5, 10, 4, "last", "interleaved"),
    (1, 0, 1, 1, 8, 4, "last", "half-split"),
]
ENTMAX = EntmaxConfig()
MOE = MoEConfig(num_experts=5, top_k=2, num_shared=1, expert_size=7, first_dense=1)
LENGTHS = [1, 2, 17, 63, 129]


def pair(
    kind,
    shape=SHAPES[1],
    sizes=SIZES[0],
    seed=0,
    indexer=INDEXERS[0],
    phase="sparse",
    share=(),
    entmax=ENTMAX,
    csa=None,
    taught=(),
    **changes,
) -> tuple[Decoder, NSAForCausalLM]:
    """A decoder and the exported model with its weights, both float64. ``taught``: keys of the section of NSA."""
    heads, groups, head_dim, v_head_dim = shape
    names = ("compress_length", "compress_stride", "block_size", "num_blocks", "num_initial", "num_local", "window")
    nsa = NsaConfig(compress_hidden=5, **dict(zip(names, sizes, strict=True)), **dict(taught))
    names = ("topk", "num_initial", "num_local", "index_heads", "index_head_dim")
    names += ("index_rotary_dims", "index_rotary_place", "index_rotary_pairs")
    dsa = DsaConfig(phase=phase, **dict(zip(names, indexer, strict=True)), **dict(share))
    attention = AttentionConfig(kind=kind, nsa=nsa, dsa=dsa, entmax=entmax, csa=csa or CsaConfig())
    moe = changes.get("moe")
    rope = RopeConfig(theta=100.0, yarn_factor=changes.pop("yarn_factor", 1.0), yarn_beta_fast=4.0)
    model = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_layers=3,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        intermediate_size=40,
        max_position=64,
        rope=rope,
        init_std=0.3,
        **changes,
    )
    torch.manual_seed(seed)
    decoder = Decoder(model, attention, backend="naive")
    with torch.no_grad():  # weights that start at a constant would hide a mistake
        for name, parameter in decoder.named_parameters():
            if name.endswith(("position", "norm.weight", "bias", "sink")):
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.5)
        for buffer in decoder.buffers():
            buffer.normal_(0.0, 0.1)
    config = NSAConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        attention_kinds=[kind.name for kind in attention.kinds(3)],
        max_position_embeddings=64,
        rotary_base=rope.theta,
        yarn_factor=rope.yarn_factor,
        yarn_beta_fast=rope.yarn_beta_fast,
        rotary_scaling=model.rope_scaling.model_dump() if model.rope_scaling else None,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        projection=model.projection,
        **(model.mla.model_dump(exclude={"v_head_dim"}) if model.mla else {}),
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=3,
        num_experts=moe.num_experts if moe else 0,
        num_experts_per_token=moe.top_k if moe else 0,
        num_shared_experts=moe.num_shared if moe else 0,
        expert_size=moe.expert_size if moe else 0,
        first_dense=moe.first_dense if moe else 0,
        **{theirs: getattr(attention.of(k), ours) for k in KINDS if k.export for ours, theirs in k.export.items()},
    )
    exported = NSAForCausalLM(config)
    exported.load_state_dict(decoder.state_dict())
    exported.tie_weights()
    return decoder.double(), exported.double().eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (rows, length))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # norms and rotary are fp32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["dense", "nsa", "dsa", ["dense", "nsa", "dsa"]])
def test_logits_are_the_decoders(kind, shape) -> None:
    for sizes, indexer in zip(SIZES, INDEXERS, strict=True) if kind in ("nsa", "dsa") else [(SIZES[0], INDEXERS[0])]:
        decoder, exported = pair(kind, shape, sizes, indexer=indexer)
        for length in LENGTHS:
            ids = tokens(2, length)
            with torch.no_grad():
                close(exported(ids).logits, decoder(ids))


LLAMA3 = RopeScaling(
    rope_type="llama3", factor=3, original_max_position_embeddings=20, low_freq_factor=0.5, high_freq_factor=3
)
YARN = RopeScaling(rope_type="yarn", factor=5, original_max_position_embeddings=40, beta_fast=3, beta_slow=0.5)
SCALED = [
    LLAMA3,
    YARN,
    YARN.model_copy(update={"attention_factor": 0.7}),
    YARN.model_copy(update={"mscale": 2.0, "mscale_all_dim": 0.5}),
]


@pytest.mark.parametrize("scaling", SCALED, ids=range(len(SCALED)))
@pytest.mark.parametrize("yarn_factor", [1.0, 4.0])
def test_scaled_frequencies_are_the_decoders(scaling, yarn_factor) -> None:
    decoder, exported = pair("dense", rope_scaling=scaling, yarn_factor=yarn_factor)
    ids = tokens(2, 70)
    with torch.no_grad():
        close(exported(ids).logits, decoder(ids))


@pytest.mark.parametrize("kind", ["nsa", "dsa"])
@pytest.mark.parametrize("changes", [{"yarn_factor": 4.0}, {"tie_embeddings": False}, {"norm_eps": 0.1}, {"moe": MOE}])
def test_options_are_the_decoders(kind, changes) -> None:
    decoder, exported = pair(kind, **changes)
    ids = tokens(2, 70)
    with torch.no_grad():
        close(exported(ids).logits, decoder(ids))


@torch.no_grad()
def test_an_indexer_in_warm_up_is_kept_and_chooses_nothing() -> None:
    decoder, exported = pair(["dsa", "dense", "dsa"], phase="warm-up")
    ids = tokens(2, 70)
    close(exported(ids).logits, decoder(ids))
    kept = exported.layers[2].attention.indexer.state_dict()
    assert kept and all(torch.equal(kept[n], t) for n, t in decoder.layers[2].attention.indexer.state_dict().items())
    norms = [model.layers[2].attention.indexer.key_norm for model in (decoder, exported)]
    assert norms[0].eps == norms[1].eps == 1e-6  # too small for logits to show
    exported.config.index_phase = "sparse"
    assert (exported(ids).logits - decoder(ids)).abs().max() > 0.01


@torch.no_grad()
def test_equal_index_scores_go_to_the_first_tokens() -> None:
    """With all scores 0, the first tokens of the document and the forced ones."""
    _, exported = pair("dsa", indexer=INDEXERS[2])  # 20 tokens, the query's own among them
    indexer = exported.layers[0].attention.indexer
    indexer.head_weight.weight.zero_()
    slots = torch.arange(50)[None]
    masks = indexer(
        torch.randn(1, 50, 24).double(), torch.randn(1, 50, 24).double(), Step(slots, 50, 0, 50, ChosenTokens()), None
    )
    token, query = torch.arange(50), torch.arange(50)[:, None]
    expected = ((token < 19) | (token == query) | (token == 19) & (query < 20)) & (token <= query)
    assert torch.equal(masks(slice(0, 50), 50)[0, 0], expected)


@pytest.mark.parametrize("moe", [None, MOE])
def test_loss_and_gradients_are_the_decoders(moe) -> None:
    decoder, exported = pair(["nsa", "dense", "dsa"], moe=moe)
    exported.train()
    ids = tokens(2, 50)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    loss = exported(ids, labels=labels).loss
    nll = decoder(ids[:, :-1], labels[:, 1:])
    expected = nll.sum() / (labels[:, 1:] != -100).sum()
    close(loss, expected)
    expected.backward()
    loss.backward()
    theirs = dict(exported.named_parameters())
    for name, parameter in decoder.named_parameters():
        if ".indexer." in name:  # the loss that trains it stays with the trainer
            assert theirs[name].grad is None
        else:
            close(theirs[name].grad, parameter.grad)


TAUGHT = [{"key_compression": "pooled"}, {"phase": "warm-up"}, {"key_compression": "pooled", "phase": "warm-up"}]
KINDS_OF_NSA = [{}, *TAUGHT]


@torch.no_grad()
@pytest.mark.parametrize("taught", TAUGHT, ids=str)
@pytest.mark.parametrize(("shape", "sizes"), [(SHAPES[0], SIZES[1]), (SHAPES[1], SIZES[0]), (SHAPES[2], SIZES[3])])
def test_logits_of_a_taught_selection_are_the_decoders(taught, shape, sizes) -> None:
    """And the weights of what is taught are kept, also where nothing is selected yet."""
    decoder, exported = pair(["nsa", "dense", "nsa"], shape, sizes, taught=taught)
    for length in LENGTHS:
        ids = tokens(2, length)
        close(exported(ids).logits, decoder(ids))
    ours, theirs = (model.layers[2].attention.compress.key.state_dict() for model in (decoder, exported))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name].double(), theirs[name]) for name in ours)
    exported.config.nsa_phase = "sparse" if "phase" in taught else "warm-up"
    assert (exported(ids).logits - decoder(ids)).abs().max() > 0.01


@torch.no_grad()
def test_pooled_keys_in_bf16_are_means_in_fp32() -> None:
    """Rounded once, as in the trainer, also under autocast."""
    _, exported = pair("nsa", taught={"key_compression": "pooled"})
    pooling = exported.layers[0].attention.compress["key"].bfloat16()
    width = pooling.gate.in_features
    pooling.gate.weight.zero_()
    pooling.outer.weight.copy_(torch.eye(width))
    pooling.position.normal_()
    x = torch.randn(1, 40, 2, width).bfloat16()
    options = {"length": pooling.length, "stride": pooling.stride}
    same = pooling.gate.weight, pooling.position, pooling.outer.weight
    exact = ops.pool_blocks(x.double(), *(weight.double() for weight in same), **options).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pooling(x), exact)
    assert torch.equal(pooling(x), exact)


@pytest.mark.parametrize("taught", TAUGHT, ids=str)
def test_gradients_of_a_taught_selection_are_the_decoders(taught) -> None:
    """The loss that teaches it stays with the trainer."""
    decoder, exported = pair("nsa", taught=taught)
    ids = tokens(2, 50)
    for layer in decoder.layers:
        if layer.attention.attend.loss is not None:
            layer.attention.attend.loss.weight = 0.0
    decoder(ids[:, :-1], ids[:, 1:]).mean().backward()
    exported.train()(ids, labels=ids).loss.backward()
    theirs = dict(exported.named_parameters())
    for name, parameter in decoder.named_parameters():
        ours, other = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, theirs[name]))
        close(other, ours)


@pytest.mark.parametrize("taught", KINDS_OF_NSA, ids=str)
def test_chunks_of_queries_change_nothing(taught, monkeypatch: pytest.MonkeyPatch) -> None:
    _, exported = pair(["nsa", "dense", "dsa"], taught=taught)
    ids = tokens(2, 90)
    with torch.no_grad():
        whole = exported(ids).logits
        monkeypatch.setattr(attention_nsa, "CHUNK_SCORES", 7 * 2 * 6 * 90)
        close(exported(ids).logits, whole)


@torch.no_grad()
def test_right_padding_changes_nothing() -> None:
    _, exported = pair(["nsa", "dense", "dsa"])
    ids, mask = tokens(3, 70), torch.ones(3, 70, dtype=torch.long)
    for row, length in enumerate((70, 41, 1)):
        mask[row, length:] = 0
    logits = exported(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, length in enumerate((70, 41, 1)):
        close(logits[row, :length], exported(ids[row : row + 1, :length]).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("taught", KINDS_OF_NSA, ids=str)
def test_any_padding_fed_in_any_pieces_equals_each_row_alone(taught) -> None:
    """Rows that fill at different speeds: blocks of one row are complete long before another's."""
    _, exported = pair(["nsa", "dense", "dsa"], taught=taught)
    ids = tokens(3, 100)
    keep = torch.tensor([[0.9], [0.4], [0.05]])
    mask = torch.rand(3, 100) < keep
    mask[0, :30], mask[1, -1], mask[2, 50] = False, False, True
    cache, logits, start = None, [], 0
    chance = random.Random(1)
    while start < 100:
        stop = min(100, start + chance.choice([1, 1, 2, 9, 23]))
        out = exported(ids[:, start:stop], attention_mask=mask[:, :stop].long(), past_key_values=cache, use_cache=True)
        cache, start = out[1], stop
        logits.append(out.logits)
    logits = torch.cat(logits, 1)
    for row in range(3):
        close(logits[row, mask[row]], exported(ids[row : row + 1, mask[row]], use_cache=False).logits[0])


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
}


@pytest.mark.parametrize(
    ("mode", "taught"), [*((mode, {}) for mode in GENERATION), *(("greedy", taught) for taught in TAUGHT)], ids=str
)
def test_generation_with_cache_equals_without(mode: str, taught) -> None:
    _, exported = pair(["nsa", "dense", "dsa"], taught=taught)
    ids, outputs = tokens(2, 21), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(
            exported.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, use_cache=use_cache, **GENERATION[mode]
            )
        )
    assert outputs[0].shape == (2, 51)
    assert outputs[0].tolist() == outputs[1].tolist()


@pytest.mark.parametrize(("moe", "taught"), [(None, {}), (MOE, {}), *((None, taught) for taught in TAUGHT)], ids=str)
def test_left_padded_batch_generates_what_each_prompt_does_alone(moe, taught) -> None:
    _, exported = pair(["nsa", "dense", "dsa"], moe=moe, taught=taught)
    prompts = [tokens(1, n)[0].tolist() for n in (40, 1, 7, 23)]
    ids = torch.tensor([[3] * (40 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (40 - len(p)) + [1] * len(p) for p in prompts])
    together = exported.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    for row, prompt in enumerate(prompts):
        alone = torch.tensor([prompt])
        alone = exported.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=30, do_sample=False)
        assert together[row, 40:].tolist() == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["nsa", "dsa"])
def test_generation_continues_from_a_returned_cache(kind) -> None:
    _, exported = pair(kind)
    ids = tokens(1, 30)
    first = exported.generate(ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    name = "cache" if "cache" in first else "past_key_values"
    again = exported.generate(first.sequences, **{name: first[name]}, max_new_tokens=10, do_sample=False)
    assert again.tolist() == exported.generate(ids, max_new_tokens=20, do_sample=False).tolist()


@torch.no_grad()
def test_cache_keeps_what_later_queries_see_and_no_more() -> None:
    _, exported = pair(["nsa", "dsa"])  # blocks of 8 at stride 4, window 12
    cache = exported(tokens(2, 50), use_cache=True)[1]
    assert {name: tuple(span.keys.shape[1:]) for name, span in cache.layers[1].items()} == {
        "full": (50, 3, 8),
        "index": (50, 1, 8),
    }
    spans = cache.layers[0]
    assert spans["compressed"].keys.shape[1] == (50 - 8) // 4 + 1
    assert (spans["tail"].start, spans["tail"].keys.shape[1]) == (44, 6)
    assert (spans["window"].start, spans["window"].keys.shape[1]) == (39, 11)
    assert spans["selected"].keys.shape[1] == 50


def test_other_caches_and_masks_are_refused() -> None:
    from transformers import DynamicCache

    _, exported = pair("nsa")
    with pytest.raises(ValueError, match="NSACache"):
        exported(tokens(1, 4), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask"):
        exported(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4))


@torch.no_grad()
def test_a_mask_has_a_row_for_each_and_a_column_for_each_token() -> None:
    """One row stands for all. A mask of another size would be of other tokens than those that the caller means."""
    _, exported = pair("nsa")
    ids, mask = tokens(2, 40), torch.ones(1, 40, dtype=torch.long)
    mask[0, :7] = 0
    together = exported(ids, attention_mask=mask).logits
    close(together, exported(ids, attention_mask=mask.expand(2, 40)).logits)
    for wrong in (torch.ones(3, 40), torch.ones(2, 20), torch.ones(2, 41)):
        with pytest.raises(ValueError, match=r"2 rows .* 40 columns"):
            exported(ids, attention_mask=wrong)
    cache = exported(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="45 columns"):
        exported(ids[:, :5], attention_mask=torch.ones(2, 44), past_key_values=cache)
    close(
        exported(ids[:, :5], attention_mask=torch.ones(2, 5), past_key_values=cache).logits,
        exported(torch.cat([ids, ids[:, :5]], 1)).logits[:, 40:],
    )


@torch.no_grad()
def test_the_cache_has_the_names_of_old_and_new_transformers() -> None:
    _, exported = pair("nsa")  # `past_key_values` before transformers 5.24, `cache` from there on
    ids = tokens(1, 30)
    whole = exported(ids, use_cache=False).logits[:, 20:]
    for name in ("past_key_values", "cache"):
        start = exported(ids[:, :20], use_cache=True)[1]
        assert torch.allclose(exported(ids[:, 20:], **{name: start}).logits, whole, atol=1e-5)
    with pytest.raises(ValueError, match="two names"):
        exported(ids, past_key_values=start, cache=start)


def test_the_files_stand_alone() -> None:
    own = {path.stem for path in hf.FILES}
    for path in hf.FILES:
        starts = (line.split()[1] for line in path.read_text().splitlines() if line.startswith(("import ", "from ")))
        imports = {start[1:] if start.startswith(".") else start.split(".")[0] for start in starts}
        assert imports <= own | {"math", "collections", "dataclasses", "typing", "torch", "transformers"}
