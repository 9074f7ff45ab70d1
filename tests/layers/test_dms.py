"""Dynamic Memory Sparsification: the layer against its definition, its limits, its cache, a short training."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa.layers import DenseAttention, MemorySparseAttention
from nsa.layers.kinds import kind_of
from nsa.layers.rotary import Rotary

HIDDEN, HEADS, GROUPS, WIDTH = 32, 4, 2, 8


def layer(seed: int = 0, **settings: object) -> MemorySparseAttention:
    torch.manual_seed(seed)
    made = MemorySparseAttention(HIDDEN, HEADS, GROUPS, WIDTH, **{"window": 5, "offset": 0.0, **settings})
    return made.double().eval()


def states(tokens: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(
        batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_()


def dense(like: MemorySparseAttention) -> DenseAttention:
    made = DenseAttention(HIDDEN, HEADS, GROUPS, WIDTH).double()
    read = dict(like.named_parameters())
    for name, parameter in made.named_parameters():
        parameter.data = kind_of("dms").from_dense(name, parameter.shape, None, lambda inside: read[inside]).data
    return made


def definition(made: MemorySparseAttention, x: Tensor, log_keep: Tensor, starts: list[int]) -> Tensor:
    """Equation by equation, for each query: log_keep (B, T, G) of the token after a key is added beyond the window."""
    local = [t - max(s for s in starts if s <= t) for t in range(x.shape[1])]
    q, (k, v), _ = made.projection(x, Rotary(made.rope_theta).at(torch.tensor(local)))
    rows = []
    for b, t in ((b, t) for b in range(len(x)) for t in range(x.shape[1])):
        heads = []
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            scores = []
            for s in range(t - local[t], t + 1):
                score = q[b, t, h] @ k[b, s, g] * WIDTH**-0.5
                scores.append(score + log_keep[b, s + 1, g] if t - s > made.attend.window else score)
            heads.append(torch.stack(scores).softmax(0) @ v[b, t - local[t] : t + 1, g])
        rows.append(torch.cat(heads))
    return made.output(torch.stack(rows).view(*x.shape[:2], -1))


def same_with_gradients(one: Tensor, two: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)
    noise = torch.randn_like(one)
    for a, b in zip(*(torch.autograd.grad((x * noise).sum(), leaves) for x in (one, two)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("starts", [[0], [0, 1, 9]], ids=["one document", "packed"])
def test_soft_eviction_is_its_definition(backend: str, starts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, of the eviction logits too. The seed gives both the same noise."""
    monkeypatch.setattr("nsa.layers.dms.layer.ROWS", 7)
    made, x = layer(backend=backend, weight=0.0).train(), states(17, batch=1)
    torch.manual_seed(5)
    mine = made(x, cu_seqlens=torch.tensor([*starts, 17], dtype=torch.int32))
    torch.manual_seed(5)
    log_keep, _ = made.decide(made.evict(x))
    theirs = definition(made, x, log_keep, starts)
    same_with_gradients(mine, theirs, [x, made.evict.weight, made.key.weight])


def test_hard_eviction_is_an_additive_mask() -> None:
    made, x = layer(), states(17)
    gone = made.evict(x) > 0
    assert 0.2 < gone.double().mean() < 0.8
    torch.testing.assert_close(
        made(x), definition(made, x, torch.zeros(gone.shape).masked_fill(gone, -torch.inf), [0]), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("settings", [{"offset": float("inf")}, {"window": 16}], ids=["no logit", "a wide window"])
@pytest.mark.parametrize("training", [False, True])
def test_where_nothing_is_evicted_it_is_dense(settings: dict[str, float], training: bool) -> None:
    made, x = layer(**settings).train(training), states(17)
    rotary = Rotary(made.rope_theta).at(torch.arange(17))
    torch.testing.assert_close(made(x), dense(made)(x, rotary), atol=1e-9, rtol=1e-9)


def test_soft_becomes_hard_without_noise_and_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))
    x, apart = states(17), []
    for temperature in (0.3, 1e-2, 1e-5):
        made = layer(temperature=temperature)
        hard = made(x)
        apart.append(float((made.train()(x) - hard).detach().abs().max()))
    assert apart[0] > apart[1] > apart[2] and apart[2] < 1e-9


@pytest.mark.parametrize("pieces", [(1,) * 24, (16, 1, 1, 6), (24,)], ids=str)
def test_decoding_on_a_cache_that_forgets_is_the_whole_sequence(pieces: tuple[int, ...]) -> None:
    made, x = layer(), states(24)
    cache, outs, before = made.new_cache(), [], None
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            outs.append(made(piece, cache=cache))
            now = [{p for p in cache.positions[b, :, g].tolist() if p >= 0} for b in range(2) for g in range(GROUPS)]
            new = set(range(cache.length - piece.shape[1], cache.length))
            assert before is None or all(a <= b | new for a, b in zip(now, before, strict=True)), (
                "forgotten is forgotten"
            )
            before = now
        torch.testing.assert_close(torch.cat(outs, 1), made(x), atol=1e-9, rtol=1e-9)
        gone = made.evict(x) > 0
    for row, (b, g) in zip(before, ((b, g) for b in range(2) for g in range(GROUPS)), strict=True):
        assert row == {t for t in range(24) if 24 - t <= 5 or not gone[b, t + 1, g]}
    assert len({len(row) for row in before}) > 1, "heads keep different numbers of tokens"


def test_the_loss_asks_for_the_share_and_no_more() -> None:
    x = states(9)
    for offset, expected in ((1e3, 0.75), (-1e3, 0.0)):
        made = layer(offset=offset).train()
        made(x).sum().backward()
        assert float(made.share.tally[0]) == pytest.approx(expected * 18)
    made = layer().eval()
    made(x).sum().backward()
    assert made.share.tally is None, "not in validation"


@pytest.mark.slow
def test_a_short_training_evicts_its_share_and_keeps_what_is_copied() -> None:
    """A few marked tokens are to be repeated at the end of the sequence; the others may be forgotten."""
    torch.manual_seed(0)
    tokens, marked, vocabulary = 32, 4, 8
    embedding = nn.Embedding(2 * vocabulary + 2, HIDDEN)
    made, head = (
        MemorySparseAttention(HIDDEN, HEADS, GROUPS, WIDTH, window=4, evicted=0.6),
        nn.Linear(HIDDEN, vocabulary),
    )
    parameters = [*embedding.parameters(), *made.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        """A marked symbol is somewhere in the first quarter; the last token asks for it."""
        text = torch.randint(vocabulary, (size, tokens))
        at = torch.randint(tokens // marked, (size,))
        rows = torch.arange(size)
        answer = text[rows, at]
        text[rows, at] += vocabulary
        text[rows, at + 1] = 2 * vocabulary + 1  # the token after a mark decides about it
        text[:, -1] = 2 * vocabulary
        return text, answer

    for _ in range(300):
        text, answer = batch(32)
        loss = functional.cross_entropy(head(made(embedding(text))[:, -1]), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.eval()
    with torch.no_grad():
        text, answer = batch(256)
        gone = (made.evict(embedding(text)) - made.offset > 0).double().mean()
        right = (head(made(embedding(text))[:, -1]).argmax(-1) == answer).double().mean()
    assert 0.5 < gone < 0.75, gone
    assert right > 0.9, right
