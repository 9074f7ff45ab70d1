"""Launches of four ranks, and of one rank to compare with."""

from typing import Any

import pytest

from tests.parallel.layouts import BASE, CLIPPED, MOE, RANKS, SCRIPT, SGD, layout, learned, references
from tests.training.tiny import on_ranks

FEW_STEPS = 4  # of a curve; the table in docs/parallelism.md has more
DEEP = ["model.num_layers=5"]
DENSE, SPARSE = ["attention.kind=dense"], ["attention.kind=nsa"]
DSA = ["attention.kind=[dsa, nsa]", "attention.dsa={topk: 8, index_heads: 2, index_head_dim: 8, index_rotary_dims: 4}"]
CSA = ["attention.kind=csa", "attention.csa={topk: 4, window: 9, heavy_ratio: 8, index_heads: 2, index_head_dim: 8}"]
CSA += ["attention.csa.index_rotary_dims=4"]
LATENT = ["model.num_kv_heads=4", "model.head_dim=12", "model.v_head_dim=8", "model.projection=mla"]
LATENT += ["model.mla={q_lora_rank: 12, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 8}"]
LATENT += [*DSA, "attention.kind=[dense, dsa]"]
# The selection learns from its loss while all is trained. Attention is not flat, so the loss is more than rounding.
GOING_ON = [*SPARSE, "attention.nsa.kl_weight=30", "attention.nsa.num_local=1", "model.init_std=0.3"]
# The same of one of four neighbouring queries: chunks of 16 tokens have whole fours.
DRAWN = [*GOING_ON, "attention.nsa.kl_stride=4"]
CASES = [
    [*BASE, *SGD, *layout(tensor=2, context=2, zero=1)],
    [*BASE, *SGD, *GOING_ON, *layout(tensor=2, context=2, zero=1)],
    [*BASE, *CLIPPED, *GOING_ON, *layout(tensor=4, zero=3), "engine.activation_checkpointing=full"],
    [*BASE, *SGD, *SPARSE, *layout(context=4, zero=2)],
    [*BASE, *SGD, *DENSE, *layout(context=2, zero=3), "training.micro_batch_size=2"],
    [*BASE, *CLIPPED, *SPARSE, *layout(tensor=4, zero=0), "training.micro_batch_size=2"],
    [*BASE, *CLIPPED, *layout(tensor=2, zero=3)],
    [*BASE, *SGD, *DSA, *layout(tensor=2, context=2, zero=1)],
    [*BASE, *SGD, *LATENT, *layout(tensor=2, context=2, zero=1)],
    [*BASE, *SGD, *LATENT, *layout(context=2, zero=3), "attention.kind=dsa", "attention.dsa.share_layers=2"],
    [*BASE, *SGD, *LATENT, *layout(tensor=2, pipeline=2, zero=1), "engine.activation_checkpointing=full"],
    [*BASE, *CLIPPED, *layout(tensor=2, pipeline=2, zero=1), "engine.activation_checkpointing=full"],
    [*BASE, *SGD, *layout(context=2, pipeline=2, zero=0), "model.tie_embeddings=false"],
    [*BASE, *SGD, *DEEP, *layout(pipeline=4, zero=2), "training.micro_batch_size=2"],  # fewer of them than stages
    [*BASE, *SGD, *MOE, *layout(expert=4, zero=0)],
    [*BASE, *CLIPPED, *MOE, *layout(expert=2, zero=2)],
    [*BASE, *SGD, *MOE, *layout(expert=2, tensor=2, zero=1), "engine.activation_checkpointing=true"],
]
# In bf16 DeepSpeed's optimizers compute the gradient norm. The first stage's only layer is dense, so one of its two
# expert-parallel ranks owns no gradient.
ROUNDED = [
    [*BASE, *SGD, *case, "engine.precision=bf16"]
    for case in (
        [*MOE, "model.moe.first_dense=1", *layout(expert=2, pipeline=2, zero=1)],
        layout(tensor=2, pipeline=2, zero=0),
        layout(tensor=2, context=2, zero=1),
    )
]
# All layouts of four ranks with experts; the cases above have some of them.
EXPERT_SPREADS = [{}, {"expert": 2}, {"expert": 4}, {"tensor": 2}]
EXPERT_SPREADS += [{"expert": 2, other: 2} for other in ("tensor", "context", "pipeline")]
EXPERT_CASES = [
    [*BASE, *optimizer, *MOE, *layout(zero=zero, **spread)]
    for spread in EXPERT_SPREADS
    for zero in range(3 if "pipeline" in spread else 4)
    for optimizer in (SGD, CLIPPED)
]
# `train: indexer`. Where only some layers have indexers, some stages of a pipeline train nothing.
START = ["attention.kind=dense", "model.num_layers=4", "model.init_std=0.3"]  # attention that is not flat
INDEXERS = [*BASE, *START, *DSA, "train=indexer", "optimizer.warmup_steps=0"]
WARM_UP, ALL, SOME = "attention.dsa.phase=warm-up", "attention.kind=dsa", "attention.kind=[dsa, dense]"
FASTER = "optimizer.learning_rate=0.02"
# Two tensor-parallel ranks have a KV head each, four share two: their queries and LSE are gathered.
SELECTIONS = [*BASE, *START, "attention.kind=nsa", "attention.nsa.phase=warm-up", "attention.nsa.num_local=1"]
SELECTIONS += ["train=indexer", "optimizer.warmup_steps=0"]
POOLED = "attention.nsa.key_compression=pooled"
TAUGHT = [
    [*INDEXERS, *SGD, ALL, WARM_UP, *layout(pipeline=2, zero=1), FASTER],
    [*INDEXERS, *CLIPPED, ALL, *layout(pipeline=2, context=2, zero=0)],
    [*INDEXERS, *CLIPPED, ALL, *layout(context=2, zero=1)],
    [*INDEXERS, *CLIPPED, SOME, WARM_UP, *layout(pipeline=4, zero=2)],
    [*INDEXERS, *SGD, SOME, *layout(pipeline=4, zero=0), FASTER],
    [*INDEXERS, *CLIPPED, ALL, "attention.dsa.share_layers=2", *layout(pipeline=2, zero=2)],
    [*INDEXERS, *CLIPPED, CSA[0], *CSA[1:], "attention.csa.heavy_ratio=null", *layout(pipeline=2, tensor=2, zero=1)],
    [*INDEXERS, *SGD, ALL, WARM_UP, *layout(pipeline=2, tensor=2, zero=1), FASTER],
    [*SELECTIONS, *SGD, *layout(context=2, tensor=2, zero=1), FASTER],
    [*SELECTIONS, *CLIPPED, POOLED, *layout(tensor=4, zero=3), FASTER],
    [*SELECTIONS, *CLIPPED, POOLED, *layout(pipeline=2, context=2, zero=0), FASTER],
]
TAUGHT_CHAINED = 3  # the case that also goes on in other layouts
TAUGHT_ROUNDED = [
    [*INDEXERS, *CLIPPED, SOME, *layout(pipeline=4, zero=zero), "engine.precision=bf16"] for zero in (0, 1)
]
TAUGHT_LINKS = [(2, layout(pipeline=4, zero=2)), (3, layout(pipeline=2, zero=1)), (4, layout(context=2, zero=0))]
SENT = [
    [*BASE, *layout(tensor=2, context=2, zero=1), "engine.activation_checkpointing=full"],
    [*BASE, *SPARSE, *layout(tensor=4, zero=0)],
    [*BASE, *GOING_ON, *layout(tensor=4, zero=0), "engine.activation_checkpointing=full"],
    [*BASE, *DRAWN, *layout(tensor=4, zero=0), "engine.activation_checkpointing=full"],
    [*BASE, *DRAWN, "model.num_kv_heads=1", *layout(tensor=2, context=2, zero=0)],
    [*BASE, *layout(tensor=2, pipeline=2, zero=1)],
    [*BASE, *LATENT, *layout(tensor=2, context=2, zero=1)],
    [*BASE, *CSA, *layout(tensor=2, context=2, zero=1)],
]
SPREADS = [{"tensor": 4}, {"tensor": 2, "context": 2}, {"context": 4}, {"tensor": 2}, {"context": 2}]
SPREADS += [{"expert": 4}, {"expert": 2, "tensor": 2}]
BROKEN = [[*BASE, *layout(tensor=2, context=2, zero=1)], [*BASE, *MOE, *layout(expert=2, pipeline=2, zero=1)]]
LINKS = [
    (2, layout(tensor=2, context=2, zero=1)),
    (3, layout(tensor=2, pipeline=2, zero=1)),
    (4, layout(context=4, zero=3)),
    (5, layout(pipeline=2, zero=0)),
    (6, layout(tensor=4, zero=2)),
]
EXPERT_LINKS = [
    (2, layout(expert=4, zero=1)),
    (3, layout(expert=2, tensor=2, zero=0)),
    (4, layout(expert=2, pipeline=2, zero=2)),
    (6, layout(expert=2, context=2, zero=3)),
]


CHECKS: dict[str, Any] = {
    "decoders": ("decoders", {"layouts": SPREADS, "seeds": 4}),
    "latent": ("decoders", {"layouts": SPREADS, "seeds": 3, "latent": True}),
    "taught nsa": ("decoders", {"layouts": SPREADS[:5], "seeds": 6, "kind": "nsa", "taught": True}),
    "csa": ("decoders", {"layouts": SPREADS[:3], "seeds": 4, "kind": "csa"}),
    "entmax": ("decoders", {"layouts": SPREADS[:2], "seeds": 3, "kind": "entmax"}),
    "curves": ("curves", {"cases": CASES, "steps": FEW_STEPS}),
    "rounded": ("curves", {"cases": ROUNDED, "steps": FEW_STEPS}),
    "not_finite": ("not_finite", {"cases": BROKEN}),
    "sent": ("sent", {"cases": SENT}),
    "chain": ("chain", {"overrides": [*BASE, "checkpoint.every=1"], "links": LINKS}),
    "experts": ("chain", {"overrides": [*BASE, *MOE, "checkpoint.every=1"], "links": EXPERT_LINKS}),
}


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    return references(tmp_path_factory.mktemp("one_process"), [*CASES, *ROUNDED], steps=FEW_STEPS)


@pytest.fixture(scope="session")
def dense_run(tmp_path_factory):
    """What runs that train indexers start from."""
    folder = tmp_path_factory.mktemp("dense_run")
    on_ranks(1, folder, {"dense": ("go_on", {"overrides": [*BASE, *START, "training.steps=2"]})}, SCRIPT, gpus=RANKS)
    return f"start_from={folder}/dense/runs/run"


@pytest.fixture(scope="session")
def taught_alone(tmp_path_factory, dense_run):
    """As the checks "taught" of `four_ranks`, in one process."""
    cases = [learned([*case, dense_run]) for case in [*TAUGHT, *TAUGHT_ROUNDED]]
    checks = {"taught": ("taught", {"cases": cases, "steps": FEW_STEPS})}
    return on_ranks(1, tmp_path_factory.mktemp("taught_alone"), checks, SCRIPT, gpus=RANKS)["taught"]


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory, dense_run):
    folder = tmp_path_factory.mktemp("four_ranks")
    cases = [[*case, dense_run] for case in [*TAUGHT, *TAUGHT_ROUNDED]]
    checks = CHECKS | {"taught": ("taught", {"cases": cases, "steps": FEW_STEPS})}
    chained = [*learned(TAUGHT[TAUGHT_CHAINED]), dense_run, "checkpoint.every=1"]
    checks["taught_on"] = ("chain", {"overrides": chained, "links": TAUGHT_LINKS})
    return folder, on_ranks(RANKS, folder, checks, SCRIPT, timeout=1800)
