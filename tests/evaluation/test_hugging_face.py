"""Methods on models of transformers: tiny random ones, beside transformers' own dense attention as a control."""

from typing import Any

import pytest
import torch
import transformers

from nsa.baselines import METHODS, Budget, Session
from nsa.baselines.methods.dense import Dense
from nsa.baselines.methods.oracle import OracleTopK
from nsa.baselines.methods.sink_window import SinkWindow
from nsa.evaluation.comparison.decoding import AttachError
from nsa.evaluation.comparison.hugging_face import NAME, TransformersReader, attached, session_of

SHAPE: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
}


def model(family: str = "llama", **fields: Any) -> Any:
    config, kind, own = FAMILIES[family]
    torch.manual_seed(0)
    return kind(config(**SHAPE | own | fields)).eval()


def ids(tokens: int = 40, batch: int = 2) -> torch.Tensor:
    return torch.randint(2, 60, (batch, tokens), generator=torch.Generator().manual_seed(1))


def generated(given: Any, **inputs: torch.Tensor) -> torch.Tensor:
    return given.generate(**inputs, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_a_full_budget_generate_what_transformers_does(family: str) -> None:
    given = model(family)
    control = generated(given, input_ids=ids())
    for method in (Dense(), OracleTopK(budget=Budget(share=1.0))):
        with attached(given, method) as session:
            assert torch.equal(generated(given, input_ids=ids()), control)
            assert session.length == 47 and not session.prompt
    with torch.no_grad(), attached(given, Dense()):
        mine = given(ids()).logits
    torch.testing.assert_close(mine, given(ids()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_a_padded_batch_is_its_rows_alone(kind: Any) -> None:
    given, method = model(), kind(budget=Budget(tokens=16), **kind.small)
    rows = [ids()[0], ids()[1, 11:]]
    padded = torch.stack([rows[0], torch.cat([torch.zeros(11, dtype=torch.int64), rows[1]])])
    mask = (torch.arange(40) >= torch.tensor([[0], [11]])).long()
    with attached(given, method):
        together = given(padded, attention_mask=mask).logits
        alone = [given(row[None]).logits[0] for row in rows]
    torch.testing.assert_close(together[0], alone[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[1, 11:], alone[1], atol=1e-4, rtol=1e-4)


def test_a_method_changes_the_output_and_is_counted() -> None:
    given = model()
    with attached(given, SinkWindow(budget=Budget(tokens=8))) as session, torch.no_grad():
        logits = given(ids()).logits
        generated(given, input_ids=ids())
    assert not torch.allclose(logits, given(ids()).logits, atol=1e-3)
    shares = session.ledger.shares()
    assert shares["reads"] == pytest.approx(8 * 7 / sum(range(41, 48)))
    assert session.ledger.ran == {(phase, layer) for phase in ("prefill", "decode") for layer in range(2)}


def test_afterwards_the_model_is_as_it_was() -> None:
    given = model()
    before, hooks = given.config._attn_implementation, len(given._forward_pre_hooks)
    with pytest.raises(IndexError), attached(given, Dense()):
        assert given.config._attn_implementation == NAME
        given(torch.full((1, 4), 99))
    assert given.config._attn_implementation == before and len(given._forward_pre_hooks) == hooks


def test_a_reader_reads_and_is_taken() -> None:
    given, tokens = model(), ids()
    reader = TransformersReader(given, session_of(given, Dense()))
    reader.begin()
    reader.read(tokens[:, :30])
    reader.end_prompt()
    other = reader.take(torch.tensor([1, 1, 0]))
    with torch.no_grad():
        control = given(tokens).logits
    for t in range(30, 34):
        torch.testing.assert_close(
            other.read(tokens[[1, 1, 0], t : t + 1]), control[[1, 1, 0], t], atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(reader.read(tokens[:, 30:31]), control[:, 30], atol=1e-4, rtol=1e-4)


def test_what_a_method_cannot_be_put_onto_is_refused() -> None:
    with pytest.raises(AttachError, match="sliding window"), attached(model("mistral", sliding_window=8), Dense()):
        pass
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20))
    with pytest.raises(AttachError, match="gpt2"), attached(gpt2, Dense()):
        pass
    given = model()
    with attached(given, Dense()):
        with pytest.raises(AttachError, match="padded on the left"):
            given(ids(), attention_mask=torch.ones(2, 40).index_fill(1, torch.tensor([39]), 0))
        with pytest.raises(AttachError, match="beam"):
            given.generate(ids(), max_new_tokens=3, num_beams=2, do_sample=False)


def test_a_session_can_be_given() -> None:
    given = model()
    session = Session(Dense(), 2)
    with attached(given, session) as same:
        assert same is session
