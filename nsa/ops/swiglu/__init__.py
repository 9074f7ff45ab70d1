"""silu(gate) * up: the middle of a SwiGLU MLP (arXiv 2002.05202)."""

from torch import Tensor
from torch.nn.functional import silu

from nsa.ops.dispatch import autocasts, resolve_backend


@autocasts("gate", "up")
def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """gate * sigmoid(gate) * up, elementwise.

    Args:
        gate, up: of the same shape and dtype. backend: auto, triton, torch or naive.

    Returns:
        A tensor of their shape and dtype. The kernel computes in fp32 and rounds once.

    Raises:
        ValueError: different shapes, unknown backend.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    if resolve_backend(backend, gate, up, heads=False) == "triton":
        from nsa.ops.kernels import swiglu as kernel

        return kernel.swiglu(gate, up)
    return silu(gate) * up
