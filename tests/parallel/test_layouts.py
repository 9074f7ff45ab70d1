"""A model that is sharded over ranks trains as in one process, and its checkpoints can be resumed in any layout."""

import json
import shutil

import pytest

from nsa.planning.dry_run import dry_run
from nsa.planning.traffic import bytes_sent
from tests.parallel import matrix
from tests.parallel.conftest import (
    CASES,
    CSA,
    EXPERT_CASES,
    ROUNDED,
    SENT,
    SPREADS,
    TAUGHT,
    TAUGHT_CHAINED,
    TAUGHT_ROUNDED,
)
from tests.parallel.layouts import BASE, MOE, RANKS, SCRIPT, STEPS, difference, learned, references
from tests.training.tiny import on_ranks, tiny_config


def test_sharded_decoders_equal_the_whole_one(four_ranks):
    """Losses and all gradients of random shapes: packed or not, empty documents, windows wider than a chunk, blocks
    across chunk boundaries, more tensor-parallel ranks than KV heads."""
    for check in ("decoders", "latent", "taught nsa", "csa", "entmax"):
        for spread, differences in zip(SPREADS, four_ranks[1][check], strict=check in ("decoders", "latent")):
            for seed, largest in enumerate(differences):
                assert largest < 2e-6, f"{check}, {spread}, seed {seed}: {largest}"


def test_curves_equal_one_process(four_ranks, reference):
    """Loss and unclipped gradient norm over a few steps, to 1e-5."""
    for case, curve in zip(CASES, four_ranks[1]["curves"], strict=True):
        assert difference(curve, reference[str(learned(case))]) < 1e-5, case


def test_curves_in_bf16_follow_fp32(four_ranks, reference):
    for case, curve in zip(ROUNDED, four_ranks[1]["rounded"], strict=True):
        assert difference(curve, reference[str(learned(case))]) < 0.03, case


def test_the_traffic_of_indexers_alone_is_as_planned(four_ranks, tmp_path):
    """Of every rank, by name: no gradient of what is frozen is sent."""
    for case, found in zip([*TAUGHT, *TAUGHT_ROUNDED], four_ranks[1]["taught"], strict=True):
        config = tiny_config(tmp_path, *case, "start_from=somewhere")
        for rank, sent in enumerate(found["sent"]):
            assert sent == bytes_sent(config, RANKS, rank), (case, rank)


def test_indexers_alone_train_as_in_one_process(four_ranks, taught_alone):
    """Their losses by layer, the gradient norm and what has moments; no gradient goes from stage to stage. With tensor
    parallelism DSA's reported loss is that of each rank's heads, and larger."""
    cases = [*TAUGHT, *TAUGHT_ROUNDED]
    for case, found, expected in zip(cases, four_ranks[1]["taught"], taught_alone, strict=True):
        bound = 0.03 if case in TAUGHT_ROUNDED else 1e-5
        curve, alone = found["curve"], expected["curve"]
        part = ".compress.key." if "attention.kind=nsa" in case else ".indexer."
        if "parallel.tensor=2" in case and CSA[0] not in case and part == ".indexer.":
            assert all(step[0] > one[0] for step, one in zip(curve, alone, strict=True))
            curve, alone = ([[step[1]] for step in steps] for steps in (curve, alone))
        assert difference(curve, alone) < bound, case
        assert found["moments"] == expected["moments"] and all(part in name for name in found["moments"]), case
        assert found["changed"] == expected["changed"] and found["changed"], case
        assert all(part in name for name in found["changed"]), case
        assert not found["gradients sent"], case


def test_sent_bytes_equal_the_dry_runs(four_ranks, tmp_path):
    """Exactly, on every rank."""
    for case, ranks in zip(SENT, four_ranks[1]["sent"], strict=True):
        for rank, sent in enumerate(ranks):
            assert sent and sent == dry_run(tiny_config(tmp_path, *case), 4, rank).sent, (case, rank)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(four_ranks):
    """With a NaN in the loss or an infinite gradient on the last rank, in layouts with each axis."""
    for steps in four_ranks[1]["not_finite"]:
        for fault, step in zip(("loss", "none", "gradient", "none"), steps, strict=True):
            for seen in step:
                assert seen["finite"] and seen["skipped"] == (fault != "none"), (fault, step)
                assert seen["changed"] == (fault == "none"), (fault, step)


def test_sent_bytes_equal_the_documented_formulas(four_ranks):
    """The first two steps of the chain: two tensor and two context ranks, one NSA layer and one dense one."""
    lines = (four_ranks[0] / "chain/runs/run/metrics.jsonl").read_text().splitlines()
    sent = {key: round(mib * 2**20) for key, mib in json.loads(lines[0]).items() if key.startswith("comm/")}
    tokens, width, micro_batches = 32, 16 + 16, 4  # per rank: half a sample, one KV head, keys and values
    once = 2 * micro_batches * tokens * width * 4  # there and back, fp32
    assert sent["comm/context_keys_mib"] == once
    assert sent["comm/context_selected_mib"] == once
    assert once / 4 <= sent["comm/context_compressed_mib"] < once / 2, "stride 4, and rows that are not used"
    assert sent["comm/tensor_activations_mib"] > 0 and sent["comm/tensor_gradients_mib"] > 0


def test_a_run_resumes_in_any_layout(four_ranks, tmp_path):
    """tp x cp -> cp and ZeRO 3 -> more tp ranks than KV heads -> one process: the losses of an uninterrupted run.
    With experts: over four ranks -> over two and the tensor-parallel ones -> ... -> one process."""
    folder, answers = four_ranks
    checks = {}
    for name, overrides in {"chain": BASE, "experts": [*BASE, *MOE]}.items():
        overrides = [*overrides, "checkpoint.every=2", "training.steps=8"]
        shutil.copytree(folder / name / "runs/run", tmp_path / f"{name}-on/runs/run")
        for run in ("on", "straight"):
            checks[f"{name}-{run}"] = ("chain", {"overrides": overrides, "links": [(8, [])]})
    losses = on_ranks(1, tmp_path, checks, SCRIPT, gpus=RANKS)
    for name in ("chain", "experts"):
        assert len(losses[f"{name}-straight"]) == 8
        assert losses[f"{name}-on"] == pytest.approx(losses[f"{name}-straight"], rel=1e-5)
        assert losses[f"{name}-on"][:6] == answers[name]


def test_indexers_alone_resume_in_any_layout(four_ranks, taught_alone):
    """Four stages, of which two train nothing -> two -> none."""
    expected = [step[0] for step in taught_alone[TAUGHT_CHAINED]["curve"]]
    assert four_ranks[1]["taught_on"] == pytest.approx(expected, rel=1e-5)


def test_expert_metrics_are_logged_in_every_layout(four_ranks):
    """The loads are those of the global batch in every layout of the chain."""
    lines = [json.loads(x) for x in (four_ranks[0] / "experts/runs/run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for layer in ("layer_00", "layer_01"):
            assert 0 < line[f"moe/mean_violation/{layer}"] <= line[f"moe/max_violation/{layer}"] < 8
            assert 0 <= line[f"moe/dead_share/{layer}"] < 1
            assert 0.9 < line[f"moe/balance_loss/{layer}"] < 1.1, "of a router that has hardly learned"
    assert lines[0]["comm/experts_tokens_mib"] > 0


@pytest.mark.slow
def test_experts_in_every_zero_stage_and_with_every_other_axis(tmp_path, tmp_path_factory):
    """As the curves above: {no, 2, 4} expert ranks x ZeRO {0, 1, 2, 3}, and two with two of each other axis."""
    one = references(tmp_path_factory.mktemp("one"), EXPERT_CASES)
    checks = {"curves": ("curves", {"cases": EXPERT_CASES, "steps": STEPS})}
    curves = on_ranks(RANKS, tmp_path, checks, SCRIPT, timeout=3600)["curves"]
    for case, curve in zip(EXPERT_CASES, curves, strict=True):
        print(case, largest := difference(curve, one[str(learned(case))]))
        assert largest < 1e-5, case


@pytest.mark.slow
@pytest.mark.parametrize("sizes", matrix.layouts(matrix.MOST_RANKS), ids=str)
def test_the_whole_table(tmp_path, tmp_path_factory, sizes):
    """As `python tests/parallel/matrix.py`, which writes docs/parallelism.md."""
    one = references(tmp_path_factory.mktemp("one"), matrix.cases((1, 1, 1), zero=0), gpus=matrix.MOST_RANKS)
    for zero, differences in matrix.run(sizes, tmp_path, one).items():
        assert max(differences) < matrix.LIMIT, f"ZeRO {zero}"
