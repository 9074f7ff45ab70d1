"""Two launches that many tests look at: starting ranks takes longer than most of what they do."""

import pytest
from tiny import on_ranks

from tests.parallel.layouts import MOE

SGD = ["optimizer.kind=sgd", "optimizer.learning_rate=0.3"]
# AdamW divides a gradient by its size, also one that is rounding alone (by 1e-8, its epsilon). So there are seeds whose
# curve half an ulp of the first weights moves by 2.6e-5 (the default one); that of this seed it moves by 3.5e-7.
ADAMW = ["optimizer.kind=adamw", "seed=3"]
OFFLOAD = "engine.offload_optimizer=true"
SELECTIVE = "engine.activation_checkpointing=selective"
CONSTANT = "optimizer.schedule=constant"
POOLED = "attention.nsa.key_compression=pooled"
DRAWN = [f"attention.nsa.{key}" for key in ("kl_weight=30", "kl_stride=4", "num_local=1")]
DRAWN += ["attention.kind=nsa", "model.init_std=0.3"]
STEPS = 10
BY_LOSS = "recovery.loss_sigma=6"
BY_NORM = ["recovery.loss_sigma=0", "recovery.grad_norm_sigma=6"]


def engines(precision, *overrides, stages=(0, 1, 2, 3)):
    """The overrides of a case for each ZeRO stage."""
    return [[f"engine.zero_stage={stage}", f"engine.precision={precision}", *overrides] for stage in stages]


def learning(precision, *overrides, stages):
    """As `engines`, with attention that is not flat, so that an indexer has something to learn."""
    return engines(precision, "model.init_std=0.3", *overrides, stages=stages)


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank")
    checks = {
        "curves": ("curves", {"cases": [SGD, ADAMW], "steps": STEPS}),
        "resume": ("resume", {"cases": engines("fp32", stages=[0]) + engines("bf16", stages=[2]), "after": [4]}),
        "drawn": ("resume", {"cases": engines("fp32", *DRAWN, stages=[0]), "after": [2]}),
        "rolled_back": ("rolled_back", {"cases": engines("fp32", BY_LOSS, stages=[0])}),
        "stages": ("stages", {"cases": learning("fp32", stages=[0])}),
        "stages of nsa": ("stages", {"cases": learning("fp32", POOLED, stages=[0]), "kind": "nsa"}),
        "sections": ("sections", {"cases": engines("fp32", stages=[0]) + engines("bf16", stages=[0])}),
        "to_step_3": ("go_on", {"overrides": [CONSTANT, "training.steps=3"]}),
        "to_step_6": ("go_on", {"overrides": [CONSTANT, "name=straight"]}),
    }
    return folder, on_ranks(1, folder, checks, gpus=2)  # where two_ranks, which are compared with it, are


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, one_rank):
    folder = tmp_path_factory.mktemp("two_ranks")
    begun = str(one_rank[0] / "to_step_3/runs/run")
    elsewhere = [CONSTANT, "engine.zero_stage=3"]
    curves = engines("fp32", *SGD, stages=[1]) + engines("fp32", *SGD, SELECTIVE, stages=[3])
    curves += engines("fp32", *ADAMW, stages=[0, 2])
    curves += engines("fp32", *ADAMW, OFFLOAD, stages=[3])
    resumed = engines("bf16", stages=[1]) + engines("fp32", stages=[2, 3]) + engines("bf16", OFFLOAD, stages=[1])
    drawn = engines("bf16", *DRAWN, "parallel.tensor=2", "engine.activation_checkpointing=full", stages=[1])
    staged = learning("bf16", stages=[1]) + learning("bf16", *MOE, stages=[3])
    staged += learning("bf16", "parallel.pipeline=2", stages=[1])
    nsa = learning("bf16", POOLED, stages=[1]) + learning("fp32", stages=[3])
    checks = {
        "curves": ("curves", {"cases": curves, "steps": STEPS}),
        "resume": ("resume", {"cases": resumed, "after": [2]}),
        "drawn": ("resume", {"cases": drawn, "after": [2]}),
        "elsewhere": ("go_on", {"overrides": elsewhere, "checkpoint_of": begun}),
        "not_finite": ("not_finite", {"cases": engines("fp32") + engines("bf16")}),
        "rolled_back": ("rolled_back", {"cases": engines("bf16", *BY_NORM, stages=[1]) + engines("fp32", stages=[3])}),
        "stages": ("stages", {"cases": staged}),
        "stages of nsa": ("stages", {"cases": nsa, "kind": "nsa"}),
        "sections": ("sections", {"cases": engines("bf16", stages=[1]) + engines("fp32", stages=[1, 3])}),
        "stopped": ("stop_one_rank", {}),
        "experts": ("resume", {"cases": engines("bf16", "parallel.expert=2", *MOE, stages=[1]), "after": [2]}),
    }
    return folder, on_ranks(2, folder, checks)
