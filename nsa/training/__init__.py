"""Trainer on DeepSpeed: engine, optimizer and schedule, checkpoints, monitor."""

import os

import torch

# DeepSpeed reads these when it is first imported. Without the first it warns on a machine with no GPU. With the second
# (a kernel for inference that this trainer never calls) every CPU start needs a C++ compiler, and the first a minute.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# cuBLAS is deterministic only with a workspace of fixed size; it must be set before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
