"""Reading a prompt and decoding: a trained decoder, and the same one with a method put onto it."""

from typing import Any

import pytest
import torch

from nsa.baselines import Budget, Session, method_named
from nsa.baselines.methods.dense import Dense
from nsa.baselines.methods.oracle import OracleTopK
from nsa.evaluation.comparison.decoding import AttachError, DecoderReader, turn_of
from nsa.models import AttentionConfig, Decoder, ModelConfig

NSA = {"compress_length": 4, "compress_stride": 2, "block_size": 8, "num_blocks": 4, "window": 16}
DSA = {"topk": 16, "index_heads": 2, "index_head_dim": 16, "index_rotary_dims": 8}
KINDS = {
    "dense": {"kind": "dense"},
    "nsa": {"kind": "nsa", "nsa": NSA},
    "dsa": {"kind": "dsa", "dsa": DSA},
    "mixed": {"kind": ["dense", "nsa", "dsa"], "nsa": NSA, "dsa": DSA},
}
CSA = {
    "ratio": 3,
    "topk": 4,
    "heavy_ratio": 6,
    "window": 7,
    "index_heads": 3,
    "index_head_dim": 8,
    "index_rotary_dims": 4,
}
COUNTED = {"kind": ["dense", "csa"], "csa": CSA}
SHAPE: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
SHAPE |= {"head_dim": 16, "intermediate_size": 48, "max_position": 128}


def decoder(kind: str, **shape: Any) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(
        ModelConfig(**SHAPE | {"init_std": 0.3} | shape),
        AttentionConfig.model_validate({**KINDS, "csa": COUNTED}.get(kind, {"kind": kind})),
    )
    return made.eval().requires_grad_(False)


def decoded(reader: DecoderReader, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """(B, T - prompt + 1, V): logits after the prompt, and after each token decoded."""
    reader.begin()
    logits = [reader.read(ids[:, :prompt])]
    reader.end_prompt()
    logits += [reader.read(ids[:, t : t + 1]) for t in range(prompt, ids.shape[1])]
    return torch.stack(logits, 1)


def ids(batch: int = 2, tokens: int = 48) -> torch.Tensor:
    return torch.randint(0, 50, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [*KINDS, "entmax", "csa"])
def test_a_reader_without_method_is_the_decoder(kind: str) -> None:
    model = decoder(kind)
    mine = decoded(DecoderReader(model, None), ids(), 40)
    with torch.no_grad():
        torch.testing.assert_close(mine, model(ids())[:, 39:].float(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_put_onto_a_kind_is_dense_where_it_chooses(kind: str) -> None:
    """For dense and DSA that is dense attention; for NSA all blocks are selected."""
    model = decoder(kind)
    everything = {"nsa": NSA | {"num_blocks": 99}, "dsa": DSA | {"topk": 99}}
    config = AttentionConfig.model_validate({"kind": KINDS[kind]["kind"], **everything})
    other = Decoder(model.config, config)
    other.load_state_dict(model.state_dict())
    mine = decoded(DecoderReader(model, Session(Dense(), 3, turn=turn_of(model))), ids(), 40)
    with torch.no_grad():
        torch.testing.assert_close(mine, other(ids())[:, 39:].float(), atol=2e-4, rtol=1e-4)


def test_afterwards_the_decoder_is_as_it_was() -> None:
    model = decoder("mixed")
    inside = [layer.attention.attend for layer in model.layers]
    names = [name for name, _ in model.named_modules()]
    reader = DecoderReader(model, Session(OracleTopK(budget=Budget(tokens=4)), 3, turn=turn_of(model)))
    decoded(reader, ids(), 40)
    with pytest.raises(IndexError):
        reader.read(torch.full((2, 1), 50))
    assert [layer.attention.attend for layer in model.layers] == inside
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("method", [None, "oracle_topk", "random"])
def test_sequences_taken_go_on_alike(method: str | None) -> None:
    """Each of a batch is taken twice after the prompt; both go on as one that was alone."""
    model, tokens = decoder("mixed"), ids()

    def reader() -> DecoderReader:
        if method is None:
            return DecoderReader(model, None)
        return DecoderReader(model, Session(method_named(method)(budget=Budget(tokens=8)), 3, turn=turn_of(model)))

    one, many = reader(), reader()
    many.read(tokens[:, :40])
    many.end_prompt()
    taken = many.take(torch.tensor([1, 0, 1]))
    after = decoded(one, tokens, 40)
    for t in range(40, 44):
        logits = taken.read(tokens[[1, 0, 1], t : t + 1])
        torch.testing.assert_close(logits, after[[1, 0, 1], t - 39], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(many.read(tokens[:, 40:41]), after[:, 1], atol=1e-5, rtol=1e-5)


def test_what_the_layers_themselves_look_at_is_counted() -> None:
    """Against the lengths and sizes of the configuration: one layer of each kind, one token decoded after 40."""
    reader = DecoderReader(decoder("mixed"), None)
    decoded(reader, ids(1, 41), 40)
    dense, nsa, dsa = (reader.ledger.counts["decode", layer] for layer in range(3))
    width, heads = 32, 2
    assert dense.reads.tolist() == [41 * width] * 2 == dense.dense_reads.tolist()
    assert dense.attended.tolist() == [41 * heads] * 2 == dense.visible.tolist()
    compressed, window, blocks = (41 - 4) // 2 + 1, 16, 3 * 8 + 1  # three whole blocks, one token of the current one
    assert nsa.reads.tolist() == [(compressed + window + blocks) * width] * 2
    assert nsa.attended.tolist() == [(compressed + window + blocks) * heads] * 2
    assert dsa.reads.tolist() == [16 * width + 41 * 16 / 2] * 2
    assert dsa.attended.tolist() == [16 * heads] * 2
    assert dsa.scored.tolist() == [41 * 2 * 16 / 16 / 2] * 2
    assert dense.resident.tolist() == [41 * width] * 2
    assert dsa.resident.tolist() == [41 * width + 41 * 16 / 2] * 2
    tail = 41 - compressed * 2  # tokens of the next compressed blocks
    assert nsa.resident.tolist() == [(41 + 16 + compressed + tail) * width] * 2


def test_what_compressed_layers_look_at_is_counted() -> None:
    """One decoded after 40, by a layer that selects and a heavy one; both have one row for the model's two KV heads."""
    reader = DecoderReader(decoder("csa", num_layers=4), None)
    decoded(reader, ids(1, 41), 40)
    selects, heavy = (reader.ledger.counts["decode", layer] for layer in (1, 3))
    assert selects.reads.tolist() == [((7 + 4) * 16 + 41 // 3 * 8) / 2] * 2
    assert selects.attended.tolist() == [(7 + 4) * 4 / 2] * 2 and selects.visible.tolist() == [41 * 2] * 2
    assert selects.scored.tolist() == [41 // 3 * 3 * 8 / 16 / 2] * 2
    assert heavy.reads.tolist() == [(7 + 41 // 6) * 16 / 2] * 2 and heavy.scored.tolist() == [0, 0]
    assert heavy.resident.tolist() == [(7 + 41 // 6 + 2 * (41 % 6)) * 16 / 2] * 2  # and values and gates of a tail
    with pytest.raises(AttachError, match="has no place for dense"):
        DecoderReader(decoder("csa"), Session(Dense(), 3))


def test_what_nsa_attends_to_beside_a_method_is_counted() -> None:
    """All tokens in the place of the selected blocks; the compressed blocks and the window as before."""
    model = decoder("mixed")
    reader = DecoderReader(model, Session(Dense(), 3, turn=turn_of(model)))
    decoded(reader, ids(1, 41), 40)
    assert reader.ledger.beside.keys() == {("prefill", 1), ("decode", 1)}
    dense, nsa, dsa = (reader.ledger.counts["decode", layer] for layer in range(3))
    nsa = nsa + reader.ledger.beside["decode", 1]
    assert reader.ledger.shares([1], beside=False)["reads"] == 1
    width, compressed, window = 32, (41 - 4) // 2 + 1, 16
    assert dense.reads.tolist() == dsa.reads.tolist() == nsa.dense_reads.tolist() == [41 * width] * 2
    assert nsa.reads.tolist() == [(41 + compressed + window) * width] * 2
    assert nsa.attended.tolist() == [(41 + compressed + window) * 2] * 2 and nsa.visible.tolist() == [41 * 2] * 2
    assert nsa.resident.tolist() == [(41 + 16 + compressed + 41 - compressed * 2) * width] * 2
    assert nsa.dense_resident.tolist() == dense.resident.tolist() == [41 * width] * 2


def test_a_model_without_place_for_a_method_is_refused() -> None:
    mla = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    model = decoder("dense", projection="mla", mla=mla, num_kv_heads=4, v_head_dim=16)
    with pytest.raises(AttachError, match="latents"):
        DecoderReader(model, Session(Dense(), 3))
