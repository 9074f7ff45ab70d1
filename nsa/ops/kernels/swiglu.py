"""silu(gate) * up and its gradients, one kernel each. Only the inputs are kept for the backward pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import begin_launch
from nsa.ops.kernels.hardware import early, vector_of

BLOCK = 2048  # elements of one program


@triton.jit(do_not_specialize=["num_vectors"])
def swiglu_kernel(Gate, Up, Out, num_vectors, VECTOR: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Out (n,) from Gate, Up (n,); n is num_vectors * VECTOR."""
    begin_launch(EARLY)
    num_elements = num_vectors.to(tl.int64) * VECTOR
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    gate = tl.load(Gate + at, mask=at < num_elements, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(Up + at, mask=at < num_elements, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(Out + at, (gate * tl.sigmoid(gate) * up).to(Out.dtype.element_ty), mask=at < num_elements)


@triton.jit(do_not_specialize=["num_vectors"])
def swiglu_backward_kernel(DOut, Gate, Up, DGate, DUp, num_vectors, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """DGate, DUp (n,) from DOut, Gate, Up (n,); n is num_vectors * VECTOR."""
    num_elements = num_vectors.to(tl.int64) * VECTOR
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    d_out = tl.load(DOut + at, mask=at < num_elements, other=0.0).to(tl.float32)  # [BLOCK]
    gate = tl.load(Gate + at, mask=at < num_elements, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(Up + at, mask=at < num_elements, other=0.0).to(tl.float32)  # [BLOCK]
    s = tl.sigmoid(gate)  # [BLOCK]
    d_gate = d_out * up * s * (1 + gate * (1 - s))  # [BLOCK]
    tl.store(DGate + at, d_gate.to(DGate.dtype.element_ty), mask=at < num_elements)
    tl.store(DUp + at, (d_out * gate * s).to(DUp.dtype.element_ty), mask=at < num_elements)


def _sizes(x: Tensor) -> dict[str, int]:
    """The integer arguments of both kernels."""
    vector = vector_of(x.numel())
    return {"num_vectors": x.numel() // vector, "VECTOR": vector, "BLOCK": BLOCK}


@torch.library.custom_op("nsa::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    if out.numel():
        programs = triton.cdiv(out.numel(), BLOCK)
        swiglu_kernel[(programs,)](gate, up, out, **_sizes(out), num_warps=8, **early(programs, each=2))
    return out


@_swiglu.register_fake
def _swiglu_fake(gate, up):
    return torch.empty_like(gate)


@torch.library.custom_op("nsa::swiglu_backward", mutates_args=())
def _swiglu_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        swiglu_backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            d_out, gate, up, d_gate, d_up, **_sizes(gate), num_warps=8
        )
    return d_gate, d_up


@_swiglu_backward.register_fake
def _swiglu_backward_fake(d_out, gate, up):
    return torch.empty_like(gate), torch.empty_like(up)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, d_out):
    gate, up = ctx.saved_tensors
    return _swiglu_backward(d_out.contiguous(), gate, up)


_swiglu.register_autograd(_differentiate, setup_context=_save)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `nsa.ops.swiglu`."""
    return _swiglu(gate.contiguous(), up.contiguous())
