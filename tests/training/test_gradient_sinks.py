"""Gradients that a recording adds to DeepSpeed's sums are those that DeepSpeed would have added."""

import os
from unittest import mock

import pytest
import torch
from tiny import tiny_config

from nsa.parallel.grid import Axis
from nsa.parallel.traffic import Traffic
from nsa.training.gradient_sinks import GradientSinks
from nsa.training.trainer import Trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """One for the module: a process joins a process group of its own once."""
    with mock.patch.dict(os.environ):
        built = Trainer(tiny_config(tmp_path_factory.mktemp("run"), "engine.precision=bf16", "engine.zero_stage=1"))
        yield built
        built.loader.close()
        built.close()


def test_the_sums_are_deepspeeds(trainer) -> None:
    """Of two micro batches, weighted: one takes DeepSpeed's way, then both ours."""
    engine, parameters = trainer.engine, list(trainer.engine.module.parameters())
    batches = trainer.loader(0)[:2]
    for batch in batches:
        engine.backward(trainer._losses(batch).sum() * 0.5, scale_wrt_gas=False)
    expected = [flat.clone() for flat in engine.optimizer.fp32_groups_gradients_flat]
    had = [list(has) for has in engine.optimizer.fp32_groups_has_gradients]
    engine.optimizer.zero_grad()
    assert not any(flat.any() for flat in engine.optimizer.fp32_groups_gradients_flat)

    sinks = GradientSinks(engine.optimizer)
    for batch in batches:
        given = {"targets": batch["targets"], "cu_seqlens": batch["cu_seqlens"]}
        loss = engine.module(batch["input_ids"], **given).sum() * 0.5
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        sinks.add(dict(zip(parameters, gradients, strict=True)))
        sinks.filled()
    for ours, theirs in zip(engine.optimizer.fp32_groups_gradients_flat, expected, strict=True):
        assert theirs.any() and torch.equal(ours, theirs)
    assert engine.optimizer.fp32_groups_has_gradients == had
    before = engine.optimizer.fp32_groups_gradients_flat[0].clone()
    sinks.add(dict.fromkeys(parameters))  # none has a gradient: nothing is added
    assert torch.equal(engine.optimizer.fp32_groups_gradients_flat[0], before)
    sinks.sum_alike()  # no rank beside this one
    assert torch.equal(engine.optimizer.fp32_groups_gradients_flat[0], before)


def test_what_ranks_hold_alike_is_one_message(trainer, monkeypatch) -> None:
    """Two norms and a matrix, over a set of ranks that doubles what it is given."""
    sent = []

    def doubled(x, axis, what, *_):
        sent.append(len(x))
        return x.mul_(2)

    monkeypatch.setattr("nsa.parallel.partition.all_reduce", doubled)
    trainer.engine.optimizer.zero_grad()
    engine, axis = trainer.engine, Axis("tensor", 0, 2, (0, 1), None, Traffic())
    parameters = dict(engine.module.named_parameters())
    alike = [p for name, p in parameters.items() if name in ("norm.weight", "layers.0.mlp_norm.weight", "head.weight")]
    alike = alike or [next(iter(parameters.values()))]
    for p in alike:
        p.summed_over = (axis,)
    sinks = GradientSinks(engine.optimizer)
    sinks.add({p: torch.ones_like(p) for p in parameters.values()})
    sinks.sum_alike()
    assert sent == [sum(p.numel() for p in alike)]
    for group, sums in zip(engine.optimizer.bf16_groups, engine.optimizer.fp32_groups_gradients, strict=True):
        for p, its_sum in zip(group, sums, strict=True):
            assert (its_sum == (2 if any(p is q for q in alike) else 1)).all()
