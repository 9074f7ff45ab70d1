"""Counts the kernels that one decoder layer launches on a GPU, without a GPU.

    python benchmarks/launches.py [--configs 25m] [--tokens 2048] [--decode] [--list] [KEY=VALUE ...]

The layer runs forward and backward on CPU tensors as it would on a GPU of --arch. Triton kernels are counted but not
run. PyTorch operators run on the CPU and are counted if they would launch a kernel (views and allocations do not). The
results of the layer are meaningless.
"""

import argparse
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from nsa.config import load_config
from nsa.models import Decoder, DecodingSteps

ROOT = Path(__file__).parents[1]
# Operators without a launch: views, allocations, queries.
FREE = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "slice", "split", "split_with_sizes", "select", "unbind"),
    *("unsqueeze", "squeeze", "expand", "alias", "detach", "as_strided", "empty", "new_empty", "empty_like", "unfold"),
    *("empty_strided", "new_empty_strided", "lift_fresh", "_local_scalar_dense", "is_same_size", "_reshape_alias"),
}


class Launches(TorchDispatchMode):
    """Counts launches by name while active, including those within the operators of this project."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = function.name().split("::")
        if namespace == "nsa":
            definition = torch._library.custom_ops.OPDEFS[function.name().split(".")[0]]
            with self:
                return definition._init_fn(*args, **(kwargs or {}))
        kernel = torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CPU")
        if not kernel and function._can_decompose():  # such as flatten or matmul: their parts are counted instead
            with self:
                return function.decompose(*args, **(kwargs or {}))
        if name.split(".")[0] not in FREE:
            self.counts[name.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def pretended_gpu(arch: str, launched: Any) -> Iterator[None]:
    """Make Triton believe that CPU tensors are on a GPU of ``arch``. Each launch calls ``launched(name)`` instead."""
    from triton.runtime.jit import JITFunction

    from nsa.ops import dispatch
    from nsa.ops.kernels import hardware

    def launch_instead(self: JITFunction, grid: tuple) -> Any:
        return lambda *args, **kwargs: launched(f"{self.fn.__module__.rpartition('.')[2]}.{self.__name__}")

    with (
        mock.patch.object(dispatch, "_on_gpu", lambda *tensors: True),
        mock.patch.object(JITFunction, "__getitem__", launch_instead),
        mock.patch.object(hardware, "architecture", lambda: arch),
        mock.patch.object(hardware, "capability", lambda: int(arch.removeprefix("sm_"))),
        mock.patch.object(dispatch, "_kernel_obstacle", lambda *tensors, **needs: None),
    ):
        yield


def layer_and_input(
    config_name: str, kind: str, tokens: int, overrides: list[str], device: str = "cpu"
) -> tuple[Any, Tensor, Any]:
    """The first decoder layer in bf16, an input that requires a gradient, and the rotary tables."""
    config = load_config(ROOT / "configs" / f"{config_name}.yaml", [*overrides, f"attention.kind={kind}"])
    one = config.model.model_copy(update={"num_layers": 1})
    with torch.device(device):
        decoder = Decoder(one, config.attention, backend="triton").bfloat16()
        x = torch.randn(1, tokens, one.hidden_size, dtype=torch.bfloat16).requires_grad_()
        return decoder.layers[0], x, decoder.rotary.at(torch.arange(tokens))


def count(
    config_name: str, kind: str, tokens: int, arch: str = "sm_90", overrides: list[str] | None = None
) -> tuple[Counter[str], Counter[str]]:
    """Launches of one layer, forward and backward, without those for the index tensors that layers share."""
    layer, x, rotary = layer_and_input(config_name, kind, tokens, overrides or [])
    passes: list[tuple[Counter[str], Counter[str]]] = []
    mode = Launches()
    with pretended_gpu(arch, lambda name: mode.counts.update([name])):
        for _ in range(2):  # the first one builds the index tensors
            layer.zero_grad()
            mode.counts = Counter()
            with mode:
                out = layer(x, rotary)
            forward, mode.counts = mode.counts, Counter()
            with mode:
                out.backward(torch.ones_like(out))
            passes.append((forward, mode.counts))
    return passes[-1]


def count_step(config_name: str, kind: str, arch: str = "sm_90") -> Counter[str]:
    """Launches that a layer adds to a decoding step."""
    config = load_config(ROOT / "configs" / f"{config_name}.yaml", [f"attention.kind={kind}"])
    token, found, mode = torch.zeros(1, 1, dtype=torch.int64), [], Launches()
    with pretended_gpu(arch, lambda name: mode.counts.update([name])):
        for layers in (2, 1):
            model = config.model.model_copy(update={"num_layers": layers})
            decoder = Decoder(model, config.attention, backend="triton").bfloat16().eval()
            steps = DecodingSteps(decoder, token, 3, capture=False)
            steps.step(token[0])  # joins weights
            mode.counts = Counter()
            with mode:
                steps.step(token[0])
            found.append(Counter(mode.counts))
    return found[0] - found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["25m"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048])
    parser.add_argument("--kinds", nargs="+", default=["nsa", "dense"])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--decode", action="store_true", help="of a decoding step instead")
    parser.add_argument("--list", action="store_true", help="name the launches")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    for config, kind in itertools.product(options.configs, options.kinds) if options.decode else ():
        counts = count_step(config, kind, options.arch)
        print(f"{config} {kind}: {counts.total()} launches of a layer in a decoding step")
        if options.list:
            print("  " + ", ".join(f"{n} {name}" for name, n in counts.most_common()))
    for config in () if options.decode else options.configs:
        for tokens in options.tokens:
            for kind in options.kinds:
                forward, backward = count(config, kind, tokens, options.arch, options.overrides)
                total = forward.total() + backward.total()
                print(f"{config} {kind} {tokens}: {forward.total()} + {backward.total()} = {total} launches")
                if options.list:
                    for title, counts in (("forward", forward), ("backward", backward)):
                        print(f"  {title}: " + ", ".join(f"{n} {name}" for name, n in counts.most_common()))


if __name__ == "__main__":
    main()
