"""Which device and precision a run uses, chosen from facts that do not change between runs."""

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

import torch

from errors import BadOption

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise BadOption(
            f"--device {name}: this PyTorch ({torch.__version__}) sees no such device",
            "use --device auto, or install a PyTorch built for it",
        )
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """(precision, why): `auto` is bf16 where the hardware multiplies it fast, else fp32."""
    if name == "fp16" and device.type == "cpu":
        return name, "asked for; a CPU computes it slowly"
    if name != "auto":
        return name, "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 units"
        return "fp16", "this GPU has no bf16 units"
    if device.type == "cpu":
        feature = cpu_bf16_feature()
        if feature:
            return "bf16", f"this CPU has {feature}"
        return "fp32", "this CPU has no bf16 units"
    return "fp32", "the precision that is known to work on " + device.type


def cpu_bf16_feature() -> str | None:
    """The CPU's bf16 instructions, as Linux names them; None where there are none, or unknown."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return None
    flags = {
        word for line in info.read_text().splitlines() for word in line.partition(":")[2].split()
    }
    return next((name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags), None)


def prepare_memory(device: torch.device) -> None:
    """Let a CPU's memory be taken from the system once; call it before the first large tensor.

    A training step frees and takes back gigabytes, and each page taken back is a fault, which costs
    more than the arithmetic on it. So glibc keeps what is freed, and PyTorch asks for 2 MB pages.
    """
    if device.type == "cpu":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        if platform.libc_ver()[0] == "glibc":
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)  # no block of its own, to be given back, for a large tensor
            libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far: the device's own on CUDA, else the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    """The device in words, for the log."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
