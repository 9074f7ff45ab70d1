"""Index sets that are recorded, and given back: full passes, decoding, recomputation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa.evaluation import decode_disagreement
from nsa.layers import record_index_sets, replay_index_sets
from nsa.layers.dsa.config import DsaConfig
from nsa.models import AttentionConfig, Decoder, ModelConfig
from nsa.training.activation_checkpointing import checkpoint_layers
from tests.ops.cases import cumulative

TOPK = 5
MODEL = ModelConfig(
    vocab_size=50, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=20,
    max_position=64, init_std=0.3,
)  # fmt: skip
INDEXER = {"topk": TOPK, "index_heads": 3, "index_head_dim": 8, "index_rotary_dims": 4}


def decoder_of(seed: int = 0, kind: Any = ("dsa", "dense"), **changes: Any) -> Decoder:
    """Seeds change the indexers alone."""
    attention = AttentionConfig(kind=list(kind), dsa=DsaConfig(**INDEXER | changes))
    decoder = Decoder(MODEL, attention)
    decoder.initialise(seed=1)
    torch.manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if ".indexer." in name:
            torch.nn.init.normal_(parameter)
    return decoder.double()


IDS = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))


def decoded(decoder: Decoder, sizes: list[int]) -> Tensor:
    caches = decoder.new_caches()
    return torch.cat([decoder(piece, caches=caches) for piece in IDS.split(sizes, 1)], 1)


def test_what_is_recorded_is_what_was_attended_to() -> None:
    """Whole and decoded; then another model that is given these sets equals the first to the bit."""
    first, second = decoder_of(1), decoder_of(2)
    with record_index_sets(first) as whole:
        decoded(first, [8, 1, 15])  # the last batch counts
        expected = first(IDS)
    with record_index_sets(first) as pieces:
        decoded(first, [9, 1, 1, 13])
    assert list(whole) == [0, 2] and all(torch.equal(whole[n], pieces[n]) for n in whole)
    assert whole[0].shape == (2, 24, TOPK) and whole[0].dtype == torch.int32
    assert not torch.allclose(second(IDS), expected)
    with replay_index_sets(second, {n: sets.long() for n, sets in whole.items()}), record_index_sets(second) as again:
        assert torch.equal(second(IDS), expected)
    assert torch.equal(again[2], whole[2])
    with replay_index_sets(second, whole):
        torch.testing.assert_close(decoded(second, [9, 1, 14]), expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(second(IDS), expected)


@pytest.mark.parametrize("after", [True, False])
def test_recomputation_attends_to_the_given_sets_and_the_indexer_learns(after: bool) -> None:
    """The backward pass within the context or after it."""
    other = decoder_of(1)
    with record_index_sets(other) as sets, torch.no_grad():
        other(IDS)
    gradients = []
    for recompute in (False, True):
        decoder = decoder_of(2)
        if recompute:
            checkpoint_layers(decoder.layers)
        with replay_index_sets(decoder, sets), record_index_sets(decoder) as recorded:
            loss = decoder(IDS, IDS.roll(-1, 1)).sum()
            if not after:
                loss.backward()
        if after:
            loss.backward()
        assert all(torch.equal(recorded[n], sets[n]) for n in sets)
        gradients.append({name: p.grad for name, p in decoder.named_parameters()})
    assert gradients[0]["layers.0.attention.indexer.key.weight"].ne(0).any()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_packed_documents_keep_to_their_own_tokens() -> None:
    decoder, ids = decoder_of(), IDS[:1]
    with record_index_sets(decoder) as sets:
        expected = decoder(ids, cu_seqlens=cumulative([10, 14]))
    with replay_index_sets(decoder, sets):
        assert torch.equal(decoder(ids, cu_seqlens=cumulative([10, 14])), expected)
        with pytest.raises(ValueError, match="layer 0 have an index that its query does not see: give sets of the"):
            decoder(ids, cu_seqlens=cumulative([11, 13]))


def test_sets_that_do_not_fit_are_refused() -> None:
    decoder = decoder_of()
    with record_index_sets(decoder) as sets:
        decoder(IDS)

    def refused(message: str, given: dict[int, Tensor], ids: Tensor = IDS) -> None:
        with pytest.raises(ValueError, match=message), replay_index_sets(decoder, given):
            decoder(ids)

    refused("layers 2 are missing", {0: sets[0]})
    refused("layers 1, 3, which select nothing", sets | {1: sets[0], 3: sets[0]})
    refused(r"layer 2 must be \(batch, tokens, 5\) integers.* got \(2, 24, 4\)", sets | {2: sets[2][..., :4]})
    refused("integers", sets | {0: sets[0].float()})
    refused("layer 0 are for 2 sequences of 20 tokens; the pass has 2, and queries up to token 24",
            sets | {0: sets[0][:, :20]})  # fmt: skip
    refused("for 2 sequences of 24 tokens; the pass has 1", sets, IDS[:1])
    later, twice = sets[0].clone(), sets[0].clone()
    later[1, 7, 0], twice[0, 9] = 8, 3
    refused("layer 0 have an index that its query does not see", sets | {0: later})
    refused("layer 0 have an index twice", sets | {0: twice})
    assert decoder.layers[0].attention.attend.choose.given is None, "also after an error"


def test_recordings_that_are_not_of_a_whole_sequence_are_refused() -> None:
    decoder = decoder_of()
    caches = decoder.new_caches()
    decoder(IDS[:, :4], caches=caches)
    with pytest.raises(ValueError, match="tokens 0 to 3 while it was recorded"), record_index_sets(decoder):
        decoder(IDS[:, 4:6], caches=caches)
    warm = decoder_of(phase="warm-up")
    with pytest.raises(ValueError, match=r"no forward pass, or the phase is"), record_index_sets(warm):
        warm(IDS)
    for act in (record_index_sets, lambda model: replay_index_sets(model, {})):
        with pytest.raises(ValueError, match="no layer of this model selects"), act(decoder_of(kind=["dense"])):
            pass


def test_decoding_selects_what_the_whole_pass_selects() -> None:
    """In fp32; and a decoding that is made to select other tokens is told."""
    decoder = decoder_of().float()
    assert decode_disagreement(decoder, IDS) == {0: 0.0, 2: 0.0}
    choice = decoder.layers[2].attention.attend.choose
    select = choice.select

    def wrong(*inputs: Tensor, cu_seqlens: Tensor | None, offset: int) -> Tensor:
        sets = select(*inputs, cu_seqlens=cu_seqlens, offset=offset)
        return sets.flip(-1) if offset % 2 else torch.cat((sets[..., 1:], sets[..., :1] * 0 - 1), -1)

    choice.select = lambda *inputs, **more: (wrong if more["offset"] >= 8 else select)(*inputs, **more)
    found = decode_disagreement(decoder, IDS, prompt=4)
    assert found == {0: 0.0, 2: pytest.approx(8 / 20)}, "in every second step of 16; an order is no difference"
    with pytest.raises(ValueError, match=r"prompt \(24\) must be from 1 to 23"):
        decode_disagreement(decoder, IDS, prompt=24)
