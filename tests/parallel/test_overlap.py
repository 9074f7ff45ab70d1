"""The communication of context- and tensor-parallel ranks overlaps with computation."""

import dataclasses

import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from nsa.layers.linear import joint_linear, parallel_linear
from nsa.models import Decoder
from nsa.ops.kernels import operators
from nsa.parallel import collectives
from nsa.parallel.decoder import parallelize
from tests.parallel.test_grid import grid_of
from tests.training.tiny import tiny_config


def logged_transfers(monkeypatch) -> list[str]:
    """Events, to which every collective adds when it starts and when it is waited for."""
    events: list[str] = []

    def log(name, kind):
        function = getattr(collectives, name)

        class Work:
            def __init__(self, work, what):
                self.work, self.what = work, what

            def wait(self):
                events.append(f"{self.what} there")
                self.work.wait()

        def logged(x, axis, dim, what):
            events.append(f"{kind}{what} out")
            transfer = function(x, axis, dim, what)
            return dataclasses.replace(transfer, work=Work(transfer.work, f"{kind}{what}"))

        monkeypatch.setattr(collectives, name, logged)

    log("_begin_gather", "")
    log("_begin_sum", "gradient of ")
    return events


def test_the_gather_of_selected_keys_overlaps_with_the_compressed_branch(tmp_path, monkeypatch):
    """The reduce-scatter of their gradients overlaps with the backward pass of the compression. Checks the order of
    starts, computations and waits on the meta device, in a fake process group."""
    events = logged_transfers(monkeypatch)

    def log_calls(module, name, event):
        function = getattr(module, name)

        def logged(*args, **kwargs):
            events.append(event)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, logged)

    log_calls(operators, "_compress_blocks", "compress")
    log_calls(operators, "_compress_blocks_backward", "compress backward")
    log_calls(operators, "_select_blocks", "select")
    log_calls(operators, "_selected_attention", "attend to selected")

    config = tiny_config(tmp_path, "attention.kind=nsa", "model.num_layers=1")
    with grid_of(rank=0, world_size=2, context=2) as grid:
        with torch.device("meta"):
            model = Decoder(config.model, config.attention, backend="triton")
            ids = torch.empty(1, 64, dtype=torch.int64)
        model = parallelize(model, grid)
        model(ids, targets=ids, cu_seqlens=torch.empty(2, dtype=torch.int32, device="meta")).sum().backward()

    def between(first: str, last: str) -> list[str]:
        return events[events.index(first) + 1 : events.index(last)]

    hidden = between("selected out", "selected there")
    assert hidden.count("compress") == 2 and "compressed there" in hidden and "select" in hidden, events
    assert "attend to selected" not in hidden and events.count("attend to selected") == 2, "one for each chunk"
    hidden = between("gradient of selected out", "gradient of selected there")
    assert hidden.count("compress backward") == 2, events


def test_the_sum_over_tensor_ranks_overlaps_with_the_gradients_of_weights(tmp_path, monkeypatch):
    """The gradient of what a joint projection reads is sent before the gradients of its weights are computed. If
    something else reads it, too, the sum of both gradients is sent, and nothing before."""
    events = logged_transfers(monkeypatch)

    class Product(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                events.append("product")
            return function(*args, **kwargs or {})

    with grid_of(rank=0, world_size=2, tensor=2) as grid, torch.device("meta"):
        weights = [torch.empty(8, 4, requires_grad=True), torch.empty(8, 4, requires_grad=True)]
        part = torch.empty(2, 3, 4, requires_grad=True)

        def backward_of(read) -> list[str]:
            out = read(collectives.all_gather(part, grid.tensor, None, "tokens"))
            del events[:]
            with Product():
                out.sum().backward()
            return list(events)

        first = backward_of(lambda x: joint_linear(x, weights))
        assert first == ["product", "gradient of tokens out", "product", "gradient of tokens there"]
        second = backward_of(lambda x: torch.cat(parallel_linear(x, *weights)))
        assert second == ["product", "gradient of tokens out", "product", "product", "gradient of tokens there"]
        for other in (lambda x: joint_linear(x, weights[:1]), lambda x: linear(x, weights[0])):
            both = backward_of(lambda x, other=other: joint_linear(x, weights[1:]) + other(x))
            assert both.index("gradient of tokens there") > len(both) - 3, both
