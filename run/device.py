"""The device and precision of a run, and its memory.

`auto` is decided by facts that do not change between sessions, so that a run resumes as it began.
"""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch

from errors import BadOption, TrainingFailed, is_out_of_memory
from model.qwen2 import Qwen2Config
from progress_bar import print_above_bars
from run.folder import Progress
from run.stopping import StopRequested

NVIDIA = ("/proc/driver/nvidia/version", "/dev/nvidia0")  # with an NVIDIA driver on Linux
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
COMPILED_SHAPES = "64"  # of products on a CPU that stay compiled; a micro-batch has some 27
DECODED_ROWS, MOST_ROWS = 128, (512, 256, 128, 64, 32)  # in parallel on a CPU, on a GPU
PROMPT_TOKENS = 1024  # for which a row of the cache has room: five solved GSM8K problems fit
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU; BadOption if the device is not available."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        refuse_idle_gpu()
        name = next(kind for kind, there in available.items() if there)
        if name == "cpu" and torch.xpu.is_available():
            print("this machine's Intel GPU is not used: nothing here has been tried on XPU")
    if not available[name]:
        raise BadOption(
            f"--device {name}: PyTorch {torch.__version__} finds no such device here",
            "use --device auto, or install a PyTorch built for it",
        )
    if name != "cuda":
        return torch.device(name)
    device = torch.device(name, local_rank)
    check_kernels(device)
    return device


def refuse_idle_gpu() -> None:
    """Raise BadOption if there is an NVIDIA GPU that this PyTorch cannot use.

    Without this, `auto` would train on the CPU for hours: the driver is too old for this build of
    PyTorch, or the build is for CPUs.
    """
    if torch.cuda.is_available() or not any(map(os.path.exists, NVIDIA)):
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    raise BadOption(
        f"this machine has an NVIDIA GPU, which PyTorch {torch.__version__}, {built}, cannot use",
        "update the driver, install a PyTorch built for it (pytorch.org/get-started), or give"
        " --device cpu to train on the CPU",
    )


def check_kernels(device: torch.device) -> None:
    """Raise BadOption if this PyTorch was built without kernels for the GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()  # such as sm_80, sm_90a, compute_120
    versions = [(name[:2], int("".join(filter(str.isdigit, name)))) for name in built]
    own = [v for kind, v in versions if kind == "sm" and v // 10 == major and v % 10 <= minor]
    later = [v for kind, v in versions if kind == "co" and v <= 10 * major + minor]
    if built and not own and not later:
        raise BadOption(
            f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) needs kernels that PyTorch"
            f" {torch.__version__} was built without: it has {', '.join(built)}",
            "install a PyTorch built for this GPU (older ones: the cu126 builds), or give"
            " --device cpu",
        )


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """(precision, reason): `auto` is bf16 on hardware with bf16 units, else fp16 on CUDA and fp32
    elsewhere.
    """
    if name == "fp16" and device.type == "cpu":
        return name, "as requested; slow on a CPU"
    if name != "auto":
        return name, "as requested"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 units"
        return "fp16", "this GPU has no bf16 units"
    if device.type == "cpu":
        feature = cpu_bf16_feature()
        if feature:
            return "bf16", f"this CPU has {feature}"
        return "fp32", "this CPU has no bf16 units"
    return "fp32", f"the only precision tested on {device.type}"


def cpu_bf16_feature() -> str | None:
    """Name of the CPU's bf16 instructions in /proc/cpuinfo; None if there are none."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return None
    flags = {
        word
        for line in info.read_text("utf-8").splitlines()
        for word in line.partition(":")[2].split()
    }
    return next((name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags), None)


def prepare(device: torch.device) -> None:
    """Set up PyTorch for the device; call it before the first large tensor.

    On CUDA, no attention may choose cuDNN, and the allocator's segments can grow: each step has
    other sizes, for which fixed segments would hold a third more memory than is used. On a CPU, the
    allocator keeps freed memory.

    A training step frees and reallocates gigabytes. Every page returned to the system costs a page
    fault when it is needed again, which takes longer than the arithmetic on it. So glibc keeps what
    is freed, and PyTorch uses 2 MB pages.

    In bf16, PyTorch and oneDNN each keep the last 1024 products that they compiled, one for each
    shape. Every new number of tokens brings some 27 of them, and their small blocks, allocated
    between large ones, keep freed memory from being merged: a process grew by 10 GB. Fewer are kept
    here; a product compiled anew takes half a millisecond.
    """
    if device.type == "cuda":  # cuDNN builds a plan for each new length, which takes half a second
        torch.backends.cuda.enable_cudnn_sdp(False)
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            # Read when CUDA first allocates; PyTorch before 2.9 knows only this name.
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if device.type == "cpu":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        for cache in ("LRU", "ONEDNN_PRIMITIVE"):  # of PyTorch's products and of oneDNN
            os.environ.setdefault(f"{cache}_CACHE_CAPACITY", COMPILED_SHAPES)
        if platform.libc_ver()[0] == "glibc":
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)  # a block from mmap is returned when it is freed
            libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def total_memory_gb(device: torch.device) -> float:
    """Memory of the device with CUDA, else of the machine; NaN where that is not reported."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):  # Windows
        return float("nan")


def free_memory_gb(device: torch.device) -> float:
    """Free memory of the device with CUDA, else of the machine; NaN where that is not reported."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) / 1e9
    info = Path("/proc/meminfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    free = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return float(next(free, "nan")) * 1024 / 1e9


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far: allocated on the device with CUDA, else the process's resident set.

    NaN where the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def decoded_rows(
    device: torch.device, config: Qwen2Config, dtype: torch.dtype, max_new_tokens: int
) -> int:
    """Sequences to decode in parallel; with CUDA, as many as free memory allows, printed.

    Half of it is left to the prompts' activations, and to the copy that a growing cache makes.
    """
    if device.type != "cuda":
        return DECODED_ROWS
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size
    row = slot * dtype.itemsize * (PROMPT_TOKENS + max_new_tokens)  # bytes
    free = free_memory_gb(device)
    rows = next((n for n in MOST_ROWS if n * row / 1e9 <= free / 2), MOST_ROWS[-1])
    taken = f"their cache takes {rows * row / 1e9:.1f} of {free:.1f} GB that are free"
    print(f"{rows} sequences are decoded in parallel: {taken}")
    return rows


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work; call it before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    """The device for people, such as "NVIDIA L4" or "x86_64 cpu, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} {device.type}, {threads} thread{'s' * (threads != 1)}"


def conditions(device: torch.device) -> dict[str, Any]:
    """What the last bits of a computation depend on, apart from the program and its input."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def session_facts(device: torch.device) -> dict[str, Any]:
    """What a run's config.json says about where its newest session runs."""
    where = {"device": describe(device), "versions": versions()}
    return where | {"conditions": conditions(device)}


def versions() -> dict[str, str]:
    """Versions of what a run's results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "tokenizers": tokenizers.__version__,
    }


def why_given_up(error: Exception, lengths: list[int]) -> tuple[bool, bool]:
    """(memory ran out, a stop is requested): why a step was given up in a micro-batch of sequences
    of these lengths. A line says so, and what follows.

    Raises another error as it is, and TrainingFailed if not even one sequence fits into memory.
    """
    if isinstance(error, StopRequested):
        print_above_bars("the step takes long: it is given up, and repeated on resuming")
        return False, True
    if not is_out_of_memory(error):
        raise error
    if len(lengths) == 1:
        raise TrainingFailed(
            f"1 sequence of {lengths[0]} tokens does not fit into memory: {_first_line(error)}",
            f"leave out long rows with --max-length {lengths[0] - 1}, use a smaller --precision, or"
            " fewer --targets, with another --out",
        ) from error
    print_above_bars("out of memory: micro-batches are half as large from now on")
    return True, False


@contextlib.contextmanager
def out_of_memory_reported(remedy: str) -> Iterator[None]:
    """Raise TrainingFailed with `remedy` if memory runs out where no smaller batch would help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingFailed(f"memory ran out: {_first_line(error)}", remedy) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "out of memory").splitlines()[0][:200]


def no_finite_gradient(
    progress: Progress, row_ids: list[int], best: Path, precision: str
) -> TrainingFailed:
    """The error for a run whose last steps, the last of them with these rows, had no finite
    gradient.
    """
    return TrainingFailed(
        f"{progress.skipped_in_a_row} steps in a row had no finite gradient, up to step"
        f" {progress.cursor}, rows {row_ids[:4]}...;"
        f" best adapter: {best if progress.best_step else 'none yet'}",
        _finite_remedy(precision),
    )


def check_trained(progress: Progress, precision: str) -> None:
    """Raise TrainingFailed for a finished run that took no step, or has no best adapter."""
    if progress.step == 0:
        cause = f"nothing was trained: none of the {progress.skipped} steps had a finite gradient"
    elif progress.best_loss is None or not (progress.best_step or progress.validations):
        cause = "no validation loss was finite after the first step, so there is no best adapter"
    else:
        return
    raise TrainingFailed(cause, _finite_remedy(precision))


def _finite_remedy(precision: str) -> str:
    if precision == "fp16":
        return "use --precision bf16 or fp32, with another --out: fp16 holds nothing above 65504"
    return "lower --learning-rate, or use --precision fp32, with another --out"
