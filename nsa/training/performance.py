"""Peak FLOP/s of the device, for the model FLOPs utilisation (MFU), and peak memory."""

import re
import resource
import sys
import time
from functools import cache

import torch

# Dense bf16 tensor-core FLOP/s (without sparsity) from the vendor's data sheets, by part of the device's name. The
# first match counts.
PEAK_FLOPS = (
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)
OTHER_GPU = r"(?! (?:Ti|D|Laptop)\b)"  # suffixes of the name of another GPU


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Peak FLOP/s of the device, and where the number comes from: "data sheet" or "measured".

    For CPUs, fp32 and unknown devices it is measured with a matrix product.
    """
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for words, flops in PEAK_FLOPS:
            if re.search(rf"\b{words}\b{OTHER_GPU}", name):
                return flops, "data sheet"
    return _measured_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32), "measured"


@cache
def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first warms up
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
