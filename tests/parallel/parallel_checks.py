"""The checks that tests of parallelism run on several ranks: `parallel_checks.py FOLDER WORLD_SIZE`, by on_ranks."""

import itertools
import random
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from rank_checks import *  # noqa: F403 - its checks serve here, too
from rank_checks import close, logged, main
from tiny import tiny_config

from nsa.layers import record_index_sets, replay_index_sets
from nsa.layers.auxiliary_loss import AuxiliaryLoss
from nsa.layers.csa.config import CsaConfig
from nsa.layers.dsa.config import DsaConfig
from nsa.layers.entmax.config import EntmaxConfig
from nsa.layers.kinds import CSA, DSA
from nsa.layers.nsa.config import NsaConfig
from nsa.layers.nsa.layer import Draw
from nsa.layers.projections.config import MlaConfig
from nsa.models import AttentionConfig, Decoder, ModelConfig, MoEConfig
from nsa.models.head import LanguageModelHead
from nsa.models.moe import MixtureOfExperts
from nsa.parallel import Grid, ParallelConfig
from nsa.parallel.chunks import Chunks
from nsa.parallel.decoder import parallelize
from nsa.parallel.grid import build_grid
from nsa.parallel.partition import partition_of
from nsa.training import checkpoint
from nsa.training.distributed import Ranks
from nsa.training.optimizer import STATE_KEYS
from nsa.training.sharded_state import gather, local_shards
from nsa.training.signals import StopRequest
from nsa.training.trainer import Trainer


def decoders(
    ranks: Ranks,
    folder: Path,
    layouts: list[dict[str, int]],
    seeds: int,
    latent: bool = False,
    kind: str | None = None,
    taught: bool = False,
) -> list[list[float]]:
    """The largest difference of a sharded decoder from the whole one, for each layout and seed, over all ranks.

    Compared are losses, and gradients relative to their largest element. ``latent``: with latent attention. ``kind``:
    of all layers; None: it is drawn. ``taught``: with NSA whose selection is taught, in two of three seeds in a
    warm-up, else by the last of some neighbouring queries.
    """
    answer = []
    for layout in layouts:
        grids = {
            heads: build_grid(ParallelConfig(**layout), ranks.rank, ranks.world_size, num_kv_heads=heads)
            for heads in (1, 2, 4, 8)
        }
        differences = []
        for seed in range(seeds):
            device = ranks.device if ranks.device.type == "cuda" else nullcontext()  # which looks at each operation
            with device, patch.object(Draw, "forward", last_of_neighbours):
                difference = decoder_difference(grids, seed, latent, kind, taught)
            differences.append(max(ranks.gather(difference)))
        answer.append(differences)
    return answer


def decoder_difference(
    grids: dict[int, Grid], seed: int, latent: bool = False, kind: str | None = None, taught: bool = False
) -> float:
    """The difference for a random small decoder, packing and layout of blocks, identical on all ranks by ``seed``.

    ``grids``: by number of KV heads.
    """
    dice = random.Random(seed)
    num_kv_heads = 8 if latent else dice.choice(list(grids))
    grid = grids[num_kv_heads]
    samples = grid.expert
    unit = 2 * grid.context.size * grid.tensor.size
    tokens = unit * dice.randint(1, 120 // unit)
    config, attention = random_shapes(dice, tokens, num_kv_heads, kind)
    if latent:
        config, attention = with_latents(config, attention, dice, seed)
    if taught:
        nsa, warm_up = attention.nsa, seed % 3 < 2
        changes = {"phase": "warm-up" if warm_up else "sparse", "key_compression": ["pooled", "mlp"][seed % 2]}
        changes |= {"block_size": nsa.compress_length, "window": min(nsa.window, 7)}  # sizes that leave a choice
        if not warm_up:
            chunk = tokens // (2 * grid.context.size)
            divisors = [n for n in (1, 2, 3, 4, 5, 6) if chunk % n == 0]  # the neighbours of chunks are those of all
            changes |= {"kl_weight": 1.0, "kl_stride": divisors[-1]}
        attention = attention.model_copy(update={"nsa": nsa.model_copy(update=changes)})
    torch.manual_seed(seed)
    whole = Decoder(config, attention).double()
    for name, p in whole.named_parameters():
        if name.endswith(("position", "router.weight", "bias")):  # and affinities far from ties
            torch.nn.init.normal_(p)
    part = Decoder(config, attention).double()
    part.load_state_dict(whole.state_dict())
    for loss in (m for decoder in (whole, part) for m in decoder.modules() if isinstance(m, AuxiliaryLoss)):
        loss.scale = 0.1
    for moe in (m for decoder in (whole, part) for m in decoder.modules() if isinstance(m, MixtureOfExperts)):
        moe.router.bias.copy_(torch.linspace(-0.1, 0.1, len(moe.router.bias)))
    part = parallelize(part, grid)

    packed = dice.random() < 0.8
    batch = 1 if packed else dice.randint(1, 2)
    ids = torch.randint(config.vocab_size, (samples.size, batch, tokens))[samples.rank]
    targets = torch.randint(config.vocab_size, (batch, tokens)).masked_fill(torch.rand(batch, tokens) < 0.2, -100)
    weights = torch.rand(batch, tokens)
    borders = random_borders(dice, tokens) if packed else None

    kinds = enumerate(attention.kinds(config.num_layers))
    selects = [n for n, kind in kinds if kind in (DSA, CSA) and attention.of(kind).phase == "sparse"]
    with record_index_sets(whole) if selects else nullcontext({}) as sets:
        expected = whole(ids, targets=targets, cu_seqlens=borders)
    assert list(sets) == selects
    (expected * weights).sum().backward()
    replayed = bool(sets) and seed % 2
    watch = record_index_sets(part) if sets and grid.context.size == 1 else nullcontext(sets)
    with replay_index_sets(part, sets) if replayed else nullcontext(), watch as found:
        losses = part(ids, targets=targets, cu_seqlens=borders)
    assert all(torch.equal(found[number], sets[number]) for number in selects)
    if grid.context.size > 1:
        chunks = Chunks.of_local(losses.shape[1], grid.context)
        expected, weights = chunks.mine(expected), chunks.mine(weights)
    (losses * weights).sum().backward()

    difference = (losses - expected).abs().max().item()
    gradients = {name: gradient(p) for name, p in whole.named_parameters()}
    if samples.size > 1:
        for g in gradients.values():
            dist.all_reduce(g, group=samples.group)
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, p in part.named_parameters():
        ours = gradient(p)
        if grid.context.size > 1:
            dist.all_reduce(ours, group=grid.context.group)
        wanted = partition_of(p).cut(gradients[name])
        assert p.shape == wanted.shape, (name, p.shape, wanted.shape)
        difference = max(difference, (ours - wanted).abs().max().item() / largest)
    return difference


def last_of_neighbours(draw: Draw, tokens: int, device: torch.device) -> torch.Tensor:
    """In the place of what is drawn."""
    return torch.arange(draw.stride - 1, tokens, draw.stride, dtype=torch.int32, device=device)


def gradient(p: torch.nn.Parameter) -> torch.Tensor:
    """The gradient, or zeros if there is none: for a sample shorter than a compression block."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def sent(ranks: Ranks, folder: Path, cases: list[list[str]]) -> list[list[dict[str, int]]]:
    """For each case: the bytes that every rank counts in a step."""
    answer = []
    for number, overrides in enumerate(cases):
        trainer = Trainer(tiny_config(folder, f"name=sent{number}", *overrides), ranks)
        answer.append(ranks.gather(trainer.train_step(StopRequest()).sent))
        close(trainer)
    return answer


def probed(ranks: Ranks, folder: Path, cases: list[list[str]]) -> list[dict[str, float]]:
    """For each case: the figures of the probe before the first step."""
    answer = []
    for number, overrides in enumerate(cases):
        trainer = Trainer(tiny_config(folder, f"name=probed{number}", *overrides), ranks)
        answer.append(trainer.probe_attention())
        close(trainer)
    return answer


def drawn(ranks: Ranks, folder: Path, cases: list[list[str]]) -> list[dict[str, Any]]:
    """For each case, of a step of training: some of what each rank gets each time that a layer draws noise, or queries,
    and the bytes of it that a rank sent."""
    answer = []
    for number, overrides in enumerate(cases):
        trainer, seen = Trainer(tiny_config(folder, f"name=drawn{number}", *overrides), ranks), list[list[float]]()
        for layer in trainer.engine.module.layers:
            attention = layer.attention
            draw = attention.noise if hasattr(attention, "noise") else attention.attend.draw
            draw.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.flatten()[:20].tolist()))
        sent = trainer.train_step(StopRequest()).sent
        answer.append({"noise": ranks.gather(seen), "sent": sent.get("tensor/noise", 0)})
        close(trainer)
    return answer


def taught(ranks: Ranks, folder: Path, cases: list[list[str]], steps: int) -> list[dict[str, Any]]:
    """For each case, a run that trains its indexers or NSA's selection: of every step the loss, the norm of the
    gradient and the loss of each layer; of the run, what has moments, which weights changed, whether stages sent each
    other gradients, and what each rank sent in the last step. The output head must not be called."""
    answer = []
    for number, overrides in enumerate(cases):
        config = tiny_config(folder, f"name=taught{number}-{ranks.world_size}", f"training.steps={steps}", *overrides)
        trainer, stop, curve, sent = Trainer(config, ranks), StopRequest(), [], Counter()
        before = dict(whole(trainer, ("weight",)))
        keys = STATE_KEYS[config.optimizer.kind]
        with patch.object(LanguageModelHead, "forward", side_effect=AssertionError("no loss is wanted")):
            for _ in range(steps):
                result = trainer.train_step(stop)
                layers = [value for key, value in sorted(result.figures.items()) if "_kl" in key]
                curve.append([result.loss, result.grad_norm, *layers])
                sent.update(result.sent)
        after = dict(whole(trainer, ("weight", *keys)))
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        found = {
            "curve": curve,
            "changed": everywhere(ranks, changed),
            "moments": everywhere(ranks, [name for name in after if not name.startswith("weight ")]),
            "gradients sent": any(ranks.gather(sent["pipeline/gradients"])),
            "sent": ranks.gather(result.sent),
        }
        close(trainer)
        answer.append(found)
    return answer


def everywhere(ranks: Ranks, names: list[str]) -> list[str]:
    """Those of all ranks, sorted."""
    return sorted(itertools.chain.from_iterable(ranks.gather(names)))


def whole(trainer: Trainer, keys: tuple[str, ...]) -> list[tuple[str, torch.Tensor]]:
    """What a checkpoint would hold of each parameter, as far as this rank would write it: "key name" and tensor."""
    tensors = gather(local_shards(trainer.engine, keys[1:]), keys)
    return [(f"{key} {name}", tensor.clone()) for key, name, tensor in tensors]


def chain(ranks: Ranks, folder: Path, overrides: list[str], links: list[tuple[int, list[str]]]) -> list[float]:
    """One run that resumes with other overrides after some steps. ``links``: (last step, overrides).

    Returns:
        The losses of the run.
    """
    for last, layout in links:
        config = tiny_config(folder, *overrides, f"training.steps={last}", *layout)
        trainer = Trainer(config, ranks)
        check_state(trainer)
        trainer.run()
        if ranks.is_main:
            trainer._run_folder.close()
    return ranks.on_main(lambda: logged(Path(config.output_dir) / config.name, "train/loss"))


def check_state(trainer: Trainer) -> None:
    """The gathered state of a resumed trainer is bitwise identical to the checkpoint."""
    folders = checkpoint.checkpoints(trainer.folder)
    if not folders:
        return
    keys = STATE_KEYS[trainer.config.optimizer.kind]
    read = {kind: checkpoint.TensorReader(folders[0], kind) for kind in ("model", "optimizer")}
    names = set()
    for key, name, tensor in gather(local_shards(trainer.engine, keys), ("weight", *keys)):
        saved = read["model"](name) if key == "weight" else read["optimizer"](f"{key}.{name}")
        assert torch.equal(saved, tensor), (key, name)
        names.add(f"{key}.{name}")
    together = set().union(*trainer.ranks.gather(sorted(names)))
    assert len(together) == len(read["model"].names()) + len(read["optimizer"].names())


def random_shapes(
    dice: random.Random, tokens: int, num_kv_heads: int, kind: str | list[str] | None = None
) -> tuple[ModelConfig, AttentionConfig]:
    stride = dice.choice([1, 2, 4])
    length = stride * dice.randint(1, 3)
    kind = kind or dice.choice(["nsa", "dense", ["nsa", "dense"], "dsa", ["dsa", "nsa"]])
    model = ModelConfig(
        vocab_size=24,
        hidden_size=12,
        num_layers=2,
        num_heads=8,
        num_kv_heads=num_kv_heads,
        head_dim=4,
        v_head_dim=4 if kind == "csa" else dice.choice([4, 6]),
        intermediate_size=16,
        max_position=512,
        tie_embeddings=dice.random() < 0.5,
        init_std=0.3,
        moe=random_experts(dice),
        qkv_bias=kind in ("dense", "dsa", "entmax") and dice.random() < 0.5,
        qk_norm=kind in ("dense", "dsa", "entmax") and dice.random() < 0.5,
    )
    return model, AttentionConfig(
        kind=kind,
        nsa=NsaConfig(
            compress_length=length,
            compress_stride=stride,
            block_size=stride * dice.randint(length // stride, 6),
            num_blocks=dice.randint(2, 5),
            num_initial=dice.randint(0, 1),
            num_local=dice.randint(0, 1),
            window=dice.choice([1, 3, 7, 16, tokens + 3]),
        ),
        dsa=DsaConfig(
            topk=dice.choice([1, 3, 16]),
            index_heads=dice.randint(1, 3),
            index_head_dim=6,
            index_rotary_dims=4,
            phase=dice.choice(["sparse", "sparse", "warm-up"]),
            share_layers=dice.randint(1, 2),
        ),
        entmax=random_entmax(dice, 8 // num_kv_heads),
        csa=random_csa(dice, tokens),
    )


def random_csa(dice: random.Random, tokens: int) -> CsaConfig:
    topk = dice.choice([None, 1, 3, 3, 16])
    return CsaConfig(
        ratio=dice.choice([2, 3, 4, 9]),
        overlap=dice.random() < 0.7,
        topk=topk,
        window=dice.choice([1, 3, 7, tokens + 3]),
        rotary_dims=dice.choice([None, 2]),
        q_lora_rank=dice.choice([None, 5]),
        index_heads=dice.randint(1, 3),
        index_head_dim=6,
        index_rotary_dims=4,
        phase="sparse" if topk is None else dice.choice(["sparse", "sparse", "warm-up"]),
        heavy_ratio=dice.choice([None, None, 5]),
    )


def random_entmax(dice: random.Random, per_group: int) -> EntmaxConfig:
    """``per_group``: query heads of a KV head. Heads without positions may begin within a rank."""
    position = dice.choice(["rotary", "alibi"])
    return EntmaxConfig(
        alpha=dice.choice([1.5, 1.5, 1.3]),
        scaling=dice.choice(["none", "asentmax", "ssmax"]),
        nope_heads=dice.randint(0, 8) if position == "alibi" else per_group * dice.randint(0, 8 // per_group),
        position=position,
    )


def with_latents(
    model: ModelConfig, attention: AttentionConfig, dice: random.Random, seed: int
) -> tuple[ModelConfig, AttentionConfig]:
    """The same shape with a dense and a DSA layer of latent attention. Two seeds in a row have both phases of DSA."""
    mla = MlaConfig(
        q_lora_rank=[5, None][seed // 2 % 2],
        kv_lora_rank=7,
        qk_nope_head_dim=4,
        qk_rope_head_dim=dice.choice([2, 4]),
        v_head_dim=6,
        rope_interleave=dice.random() < 0.5,
    )
    changes = {"projection": "mla", "mla": mla, "head_dim": mla.qk_head_dim, "v_head_dim": 6}
    changes |= {"qkv_bias": False, "qk_norm": False}
    model = ModelConfig.model_validate(dict(model) | changes)
    dsa = attention.dsa.model_copy(update={"phase": ["sparse", "warm-up"][seed % 2]})
    return model, attention.model_copy(update={"kind": ["dense", "dsa"], "dsa": dsa})


def random_experts(dice: random.Random) -> MoEConfig | None:
    if dice.random() < 0.3:
        return None
    return MoEConfig(
        num_experts=dice.choice([4, 8, 20]),
        top_k=dice.randint(2, 4),
        num_shared=dice.randint(0, 2),
        expert_size=4,
        first_dense=dice.randint(0, 1),
        loss_weight=dice.choice([0.0, 0.5]),
    )


def random_borders(dice: random.Random, tokens: int) -> torch.Tensor:
    """Boundaries of documents of any length, some of them empty."""
    inner = sorted(dice.randint(0, tokens) for _ in range(dice.randint(0, 6)))
    return torch.tensor([0, *inner, tokens], dtype=torch.int32)


if __name__ == "__main__":
    checks: dict[str, Any] = dict(globals())
    main(checks)
