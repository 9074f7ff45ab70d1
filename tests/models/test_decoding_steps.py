"""Decoding on memory that stays where it is: results, addresses, and that no step waits for the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa.cache.rows import Rows
from nsa.layers.dsa.config import DsaConfig
from nsa.layers.index_sets import record_index_sets
from nsa.layers.projections.config import MlaConfig
from nsa.models import Decoder, DecodingSteps, MoEConfig, generate
from tests.models.test_decoder import small

KINDS = ["dense", "nsa", ["nsa", "dense"]]
# What makes the host wait for the device, or gives a shape that depends on values.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")


class NoWait(TorchDispatchMode):
    """Refuses operators that CUDA graphs cannot capture, and copies between devices by way of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        assert name not in WAITS, f"{function.name()} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(x is None or x.dtype != torch.bool for x in args[1]), "a mask as an index gives a shape"
        self.seen += 1
        return function(*args, **kwargs or {})


class Apart(NoWait):
    """Refuses also what is on the CPU: a step on the meta device stands for one on a GPU.

    The operators choose as on a GPU: kernels, of which the meta device knows the shapes of results, or PyTorch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = super().__torch_dispatch__(function, types, args, kwargs)
        for x in tree_leaves((args, kwargs, found)):
            assert not isinstance(x, torch.Tensor) or x.is_meta, f"{function.name()} reads or writes host memory"
        self.names.add(function.name())
        return found


def without_values(steps: DecodingSteps) -> DecodingSteps:
    """Everything that a step reads or writes moves to the meta device."""
    steps.decoder.to("meta")
    for owner in (steps, steps._position):
        for name, x in vars(owner).items():
            if isinstance(x, torch.Tensor):
                setattr(owner, name, x.to("meta"))
    for part in (rows for cache in steps.caches for rows in vars(cache).values() if isinstance(rows, Rows)):
        part._memory = tuple(x.to("meta") for x in part.memory)
    return steps


def decoder_of(kind, **changes) -> Decoder:
    torch.manual_seed(0)
    return Decoder(*small(kind, **changes)).double().eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [1, 29])
def test_steps_equal_the_whole(kind, prompt: int) -> None:
    """Prompts shorter and longer than a compression block (8) and the window (12); steps far beyond both."""
    decoder, ids = decoder_of(kind), torch.randint(0, 97, (2, 50))
    expected = decoder(ids)
    steps = DecodingSteps(decoder, ids[:, :prompt], 50)
    torch.testing.assert_close(steps.logits, expected[:, prompt - 1])
    for token in range(prompt, 50):
        torch.testing.assert_close(steps.step(ids[:, token]), expected[:, token])
    assert steps.length == 50


LATENT = MlaConfig(kv_lora_rank=6, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
BY_KERNELS = {"v_head_dim": 8}  # in fp32; those of attention take no rows of 24 bytes
WITH_LATENTS = {"projection": "mla", "mla": LATENT, "num_kv_heads": 4, "head_dim": 12}


@pytest.mark.parametrize("kind", ["dense", "dsa"])
def test_steps_with_latents_equal_the_whole(kind) -> None:
    decoder = dsa_decoder({}, **WITH_LATENTS) if kind == "dsa" else decoder_of(kind, **WITH_LATENTS)
    ids = torch.randint(0, 97, (2, 20))
    steps, expected = DecodingSteps(decoder, ids[:, :5], 20), decoder(ids)
    for token in range(5, 20):
        torch.testing.assert_close(steps.step(ids[:, token]), expected[:, token])


DSA = {"topk": 9, "num_local": 2, "index_heads": 3, "index_head_dim": 8, "index_rotary_dims": 4}


def dsa_decoder(changes: dict, **model) -> Decoder:
    torch.manual_seed(0)
    config, attention = small("dsa", **model)
    attention = attention.model_copy(update={"dsa": DsaConfig(**DSA | changes)})
    return Decoder(config, attention).double().eval()


CHANGES = [{}, {"share_layers": 2, "share_from": 1}, {"phase": "warm-up"}, {"index_fp8": True}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_steps_of_indexed_layers_equal_the_whole(changes: dict) -> None:
    """More tokens than a query selects; groups of layers that share their sets; also without a wait."""
    decoder, ids = dsa_decoder(changes), torch.randint(0, 97, (2, 24))
    steps, expected = DecodingSteps(decoder, ids[:, :7], 24), decoder(ids)
    for token in range(7, 24):
        with NoWait():
            logits = steps.step(ids[:, token])
        torch.testing.assert_close(logits, expected[:, token])
    assert all(layer.attention.share.index is None for layer in decoder.layers)


TAUGHT = [{"key_compression": "pooled"}, {"phase": "warm-up"}, {"key_compression": "pooled", "phase": "warm-up"}]


@pytest.mark.parametrize("changes", TAUGHT, ids=str)
@pytest.mark.parametrize("prompt", [1, 7, 29])
def test_steps_of_nsa_that_is_or_was_taught_equal_the_whole(changes: dict, prompt: int) -> None:
    """Pooled keys beyond blocks and window; the warm-up, which sees all tokens; also without a wait."""
    torch.manual_seed(0)
    config, attention = small("nsa")
    attention = attention.model_copy(update={"nsa": attention.nsa.model_copy(update=changes)})
    decoder, ids = Decoder(config, attention).double().eval(), torch.randint(0, 97, (2, 50))
    for name, parameter in decoder.named_parameters():
        if name.endswith("compress.key.position"):
            torch.nn.init.normal_(parameter)
    steps, expected = DecodingSteps(decoder, ids[:, :prompt], 50), decoder(ids)
    torch.testing.assert_close(steps.logits, expected[:, prompt - 1])
    for token in range(prompt, 50):
        with NoWait():
            logits = steps.step(ids[:, token])
        torch.testing.assert_close(logits, expected[:, token])


def test_index_sets_of_steps_are_not_recorded() -> None:
    decoder, ids = dsa_decoder({}), torch.randint(0, 97, (2, 30))
    steps = DecodingSteps(decoder, ids[:, :9], 30)
    with pytest.raises(ValueError, match="not by DecodingSteps"), record_index_sets(decoder):
        steps.step(ids[:, 9])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing_and_keeps_its_addresses(kind) -> None:
    decoder, ids = decoder_of(kind), torch.randint(0, 97, (2, 32))
    steps = DecodingSteps(decoder, ids[:, :20], 32)

    def addresses() -> list[int]:
        rows = [part for cache in steps.caches for part in vars(cache).values() if hasattr(part, "_memory")]
        return [x.data_ptr() for part in rows for x in part._memory] + [steps.logits.data_ptr()]

    before = addresses()
    for token in range(20, 32):
        with NoWait() as watch:
            steps.step(ids[:, token])
        assert watch.seen
    assert addresses() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("model", [{}, BY_KERNELS, WITH_LATENTS], ids=["6", "8", "latents"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("dense", {}), *(("dsa", x) for x in CHANGES), *(("nsa", x) for x in ({}, *TAUGHT))],
    ids=str,
)
def test_a_step_on_another_device_has_no_part_on_the_host(kind, changes: dict, model: dict, dtype: torch.dtype) -> None:
    """Else no CUDA graph can capture it."""
    if kind == "nsa" and model is WITH_LATENTS:
        pytest.skip("no such projection")
    config, attention = small(kind, **model)
    if kind != "dense":
        sizes = DsaConfig(**DSA | changes) if kind == "dsa" else attention.nsa.model_copy(update=changes)
        attention = attention.model_copy(update={kind: sizes})
    decoder = Decoder(config, attention).to(dtype).eval()
    steps = without_values(DecodingSteps(decoder, torch.randint(0, 97, (2, 20)), 24))
    with Apart() as watch:
        steps.step(torch.zeros(2, dtype=torch.int64, device="meta"))
    by_kernels = watch.names & {"nsa::decode_attention", "nsa::native_sparse_decode"}
    assert bool(by_kernels) == (dtype == torch.float32 and model is BY_KERNELS), "not the way that was meant"


def test_the_watch_sees_the_host() -> None:
    x = torch.ones(2, device="meta")
    for bad in (lambda: torch.tensor([1.0]).to(x), lambda: x.new_zeros(2) + torch.zeros(()), lambda: torch.zeros(2)):
        with pytest.raises(AssertionError, match="host memory"), Apart():
            bad()


def test_the_watch_sees_waits() -> None:
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0], lambda: bool((x > 0).all())):
        with pytest.raises(AssertionError, match=r"waits|mask"), NoWait():
            wait()


@pytest.mark.parametrize("kind", ["dense", "nsa"])
def test_steps_under_autocast_keep_one_copy_of_the_joined_weights(kind) -> None:
    """A cast is another tensor in each step. Logits are near those of fp32; in bf16 NSA selects some other blocks."""
    torch.manual_seed(0)
    decoder, ids = Decoder(*small(kind)).eval(), torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        expected = decoder(ids)
    with torch.autocast("cpu", torch.bfloat16):
        steps = DecodingSteps(decoder, ids[:, :20], 40)
        for token in range(20, 40):
            assert (steps.step(ids[:, token]) - expected[:, token]).norm() < 0.1 * expected[:, token].norm()
    assert steps.logits.dtype == torch.bfloat16, "computed in fp32"
    assert len(steps._joined) == decoder.config.num_layers


@pytest.mark.parametrize("kind", ["dense", "nsa"])
def test_greedy_generation_equals_the_whole(kind) -> None:
    decoder, ids = decoder_of(kind), torch.randint(0, 97, (2, 9))
    found = generate(decoder, ids, 25)
    assert found.shape == (2, 34) and torch.equal(found[:, :9], ids)
    assert torch.equal(decoder(found)[:, 8:-1].argmax(-1), found[:, 9:])
    assert torch.equal(generate(decoder, ids, 0), ids) and torch.equal(generate(decoder, ids, 1), found[:, :10])


def test_drawn_tokens_follow_the_generator() -> None:
    decoder, ids = decoder_of("dense"), torch.randint(0, 97, (1, 4))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generate(decoder, ids, 12, temperature=3.0))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(generate(decoder, ids, 12, temperature=1e-5), generate(decoder, ids, 12)), "cold: the likeliest"
    hot = [generate(decoder, ids, 12, temperature=1e5) for _ in range(2)]
    assert not torch.equal(*hot)


def test_mistakes_are_named() -> None:
    decoder, ids = decoder_of("dense"), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one token"):
        DecodingSteps(decoder, ids[:, :0], 4)
    with pytest.raises(ValueError, match="does not hold the prompt"):
        DecodingSteps(decoder, ids, 3)
    with pytest.raises(ValueError, match="must be one of auto, triton, torch, naive, got 'cublas'"):
        DecodingSteps(decoder, ids, 4, products="cublas")  # not first by a step
    with pytest.raises(ValueError, match="caches are full"):
        DecodingSteps(decoder, ids, 4).step(ids[:, 0])
    with pytest.raises(ValueError, match="no cache of fixed memory"):
        DecodingSteps(decoder_of("entmax"), ids, 4)
    with pytest.raises(ValueError, match="must not be negative"):
        generate(decoder, ids, -1)
    with pytest.raises(ValueError, match="how many tokens each expert gets"):
        DecodingSteps(decoder_of("dense", moe=MoEConfig(num_experts=2, top_k=2, expert_size=8)), ids, 4, capture=True)
