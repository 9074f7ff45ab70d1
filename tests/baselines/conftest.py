"""Kernels in Triton's interpreter: with its shortcuts."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.ops import quick_interpreter

    quick_interpreter.install()
