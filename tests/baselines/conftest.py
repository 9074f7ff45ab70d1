"""Kernels in Triton's interpreter: with its shortcuts, as in tests/ops."""

import tests.ops.conftest  # noqa: F401
