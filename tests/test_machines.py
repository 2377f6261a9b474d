"""Tests of other systems: Windows, network file systems, narrow terminals, log files."""

import ast
import ctypes
import errno
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import files
from data import load_source
from errors import BadOption, run_script
from model.qwen2 import Qwen2Config
from progress_bar import progress_bar
from run import base as run_base
from run import device as run_device
from run.base import Base
from run.device import decoded_rows, free_memory_gb, pick_device, prepare
from run.folder import OWNER, lock
from run.fp16 import overflows, settle_fp16
from tests import toys
from tests.campaign.harness import run
from tests.scripts import script

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data", "lora", "model", "run", "evaluation", "report")
PRODUCT = [*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))]
# What Windows lacks: the modules, and the constants and functions of those it has.
WINDOWS = """
import sys, signal, os, errno
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
os.environ["USERNAME"] = "someone"
del signal.SIGHUP, signal.SIGPIPE, os.geteuid
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    base = toys.write_checkpoint(folder / "base", hidden=32, intermediate=48)
    data = toys.write_arithmetic(folder / "data", rows=40, test_rows=6)
    return ["--model", base, "--data", data, "--precision", "fp32", "--device", "cpu"]


def test_training_and_evaluation_work_without_the_modules_that_windows_lacks(flags, tmp_path):
    out = tmp_path / "run"
    done = script(
        "train.py", [*flags, "--out", out, "--rank", 2, "--max-steps", 4, "--epochs", 1],
        before=WINDOWS,
    )  # fmt: skip
    assert done.returncode == 0 and (out / "best").is_dir(), done.stderr
    asked = ["--adapter", out / "best", "--max-new-tokens", 4, "--limit", 4, "--device", "cpu"]
    done = script("evaluate.py", asked, before=WINDOWS)
    assert done.returncode == 0 and list(out.glob("evaluation/*/result.json")), done.stderr


@pytest.mark.parametrize("code", ["EINVAL", "ENOSYS", "EOPNOTSUPP", "EACCES"])
def test_a_folder_that_cannot_be_synced_costs_one_line_and_not_the_file(
    tmp_path, monkeypatch, capsys, code
):
    files._say_folders_are_not_synced.cache_clear()
    fsync = os.fsync

    def refuse_folders(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(getattr(errno, code), "no folders here")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    files.write_json(tmp_path / "a.json", {"a": 1})
    files.write_folder(tmp_path / "folder", {"b": b"2"})
    assert files.damage(tmp_path / "folder") is None
    assert capsys.readouterr().out.count("a power cut may undo the last renames") == 1


def test_a_disk_that_fails_while_a_folder_is_synced_is_an_error(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="input/output"):
        files.sync_folder(tmp_path)


def test_a_locked_folder_names_its_owner_and_a_dead_owner_does_not_keep_it_locked(tmp_path):
    take = f"from run.folder import lock; from pathlib import Path; lock(Path({str(tmp_path)!r}))"
    code = take + "; print('mine', flush=True); input()"
    owner = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert owner.stdout.readline() == "mine\n"
    with pytest.raises(files.UserError, match=f"in use by process {owner.pid} on"):
        lock(tmp_path)
    owner.kill()
    owner.wait()
    lock(tmp_path)
    assert f"process {os.getpid()} " in (tmp_path / OWNER).read_text()


def test_output_can_be_printed_in_any_encoding(flags, tmp_path):
    rows = tmp_path / "\u6570\u636e.jsonl"
    rows.write_text('{"question": "\u00e9 \u6570 \U0001f600?", "answer": "\u00df"}\n' * 2, "utf-8")
    shown = script(
        "train.py", [*flags[:2], "--data", rows, "--show-example"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, text=False,
    )  # fmt: skip
    assert shown.returncode == 0 and b"UnicodeEncodeError" not in shown.stderr, shown.stderr
    assert shown.stdout.isascii() and b"?" in shown.stdout


def test_every_text_file_is_opened_with_an_encoding():
    """By default Windows opens text files in a local encoding."""
    missing = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(
                node.func, ast.Attribute | ast.Name
            ):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = [a.value for a in node.args if isinstance(a, ast.Constant)]
            encoded = "utf-8" in given or any(k.arg == "encoding" for k in node.keywords)
            binary = any(isinstance(mode, str) and "b" in mode for mode in given)
            is_text = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
            is_text |= name == "open" and not binary and not _is_os_open(node.func)
            if is_text and not encoded:
                missing.append(f"{path.name}:{node.lineno}")
    assert not missing


def _is_os_open(func: ast.expr) -> bool:
    return isinstance(func, ast.Attribute) and getattr(func.value, "id", "") == "os"


def test_a_progress_bar_in_a_log_file_writes_whole_lines(capfd):
    with progress_bar(total=4, desc="x", delay=0, mininterval=0) as bar:
        for _ in range(4):
            bar.update()
        bar.write("a line")
    found = capfd.readouterr()
    assert found.out == "a line\n"
    lines = found.err.splitlines()
    assert len(lines) >= 4 and all(line.startswith("x:") and "\r" not in line for line in lines)


def test_a_bar_in_a_log_file_appears_after_its_delay_however_often_it_is_drawn(capfd):
    with progress_bar(total=4, desc="x", delay=5, mininterval=0) as bar:
        for passed, drawn in ((4.9, 0), (5.1, 1)):
            bar._time = lambda passed=passed: bar.start_t + passed
            bar.refresh()
            assert len(capfd.readouterr().err.splitlines()) == drawn


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_bars_inside_each_other_share_one_line_for_a_notebook_cannot_move_the_cursor(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress_bar(total=2, desc="outer", mininterval=0) as outer:
        outer.update()
        for _ in progress_bar(range(3), desc="inner", mininterval=0, leave=False):
            outer.write("a line", file=screen)
    drawn = screen.getvalue()
    assert "inner: 100%" in drawn and "outer:  50%" in drawn
    assert "\x1b" not in drawn and drawn.count("\n") == 3 + 1  # the lines, and the end


# fp16, on GPUs without bf16 units


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A base that is finite in fp32, and whose MLPs exceed 65504."""
    folder = toys.write_checkpoint(tmp_path_factory.mktemp("fp16") / "base", hidden=32, std=0.3)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "down_proj" in name or "up_proj" in name:
            tensors[name] *= 1e4  # which fp16 holds, but not the product of the two
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_auto_takes_fp32_where_fp16_overflows_and_a_resumed_run_stays_as_it_began(
    overflowing, flags
):
    rows = load_source(str(flags[3])).train
    bases = [Base.find(str(f), precision="fp16", device="cpu") for f in (overflowing, flags[1])]
    for base, expected in zip(bases, (["fp32", "fp32", "fp16"], ["fp16", "fp32", "fp16"])):
        settled = [settle_fp16(base, "auto", saved, rows, 2048) for saved in (None, "fp32", "fp16")]
        assert [s.precision for s in settled] == expected
    assert settle_fp16(bases[1], "fp16", None, rows, 2048) is bases[1]
    assert "overflows in fp16" in settle_fp16(bases[0], "auto", None, rows, 2048).lines()[-1]
    as_fp32 = replace(bases[0], precision="fp32")
    assert settle_fp16(as_fp32, "fp32", None, rows, 2048) is as_fp32
    assert not overflows(as_fp32, rows[:4], 2048)


def test_fp16_that_was_requested_and_overflows_is_refused_before_the_run_has_a_folder(
    overflowing, flags, tmp_path
):
    asked = ["--model", overflowing, *flags[2:4], "--device", "cpu", "--precision", "fp16"]
    ended = run(asked, tmp_path / "run")
    assert ended.code == 2 and "not finite" in ended.two_line_error()
    assert "--precision bf16" in ended.err
    assert not (tmp_path / "run").exists()


# Memory and devices


RAGGED = """
import ctypes, torch
from run.device import prepare

class Malloc(ctypes.Structure):  # struct mallinfo2 of glibc
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks used free keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

prepare(torch.device("cpu"))
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Malloc
weight, used = torch.ones(256, 256, dtype=torch.bfloat16), []
for tokens in range(100, 400):
    torch.zeros(tokens, 256, dtype=torch.bfloat16) @ weight
    used.append(libc.mallinfo2().used)
print(used[-1] - used[199])
"""


def test_products_of_ever_new_token_counts_do_not_fill_a_cpus_memory():
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("malloc does not say what is in use")
    clean = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    environment = clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    grown = subprocess.check_output([sys.executable, "-c", RAGGED], env=environment, text=True)
    assert int(grown) < 5e6  # bytes; 55 million on a CPU whose products are compiled by shape


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_on_cuda_grows_in_place_unless_the_user_configured_it(monkeypatch, own):
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda _: None)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "x")  # so that it is restored
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:64")
    prepare(torch.device("cpu"))
    assert ("PYTORCH_CUDA_ALLOC_CONF" in os.environ) == (own == "PYTORCH_CUDA_ALLOC_CONF")
    prepare(torch.device("cuda"))
    kept = {None: "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == kept.get(own)


def test_an_intel_gpu_that_is_not_used_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(run_device, "NVIDIA", ())
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert pick_device("auto").type == "cpu" and "Intel GPU is not used" in capsys.readouterr().out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("Tried to allocate 14 MiB\nmore"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   MemoryError()])  # fmt: skip
def test_memory_that_runs_out_anywhere_is_an_error_of_two_lines(error, capsys):
    def validate():
        raise error

    assert run_script(validate) == 1
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause.startswith("error: memory ran out") and "--batch-size" in remedy


def test_a_base_that_does_not_fit_into_memory_is_refused_in_two_lines(tmp_path, monkeypatch):
    def load_model(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 260.00 MiB.")

    monkeypatch.setattr(run_base, "load_model", load_model)
    base = Base.find(str(toys.write_checkpoint(tmp_path / "base")), precision="fp32", device="cpu")
    with pytest.raises(BadOption, match="do not fit into the memory") as caught:
        base.load()
    assert "--device cpu" in caught.value.remedy


def test_the_free_memory_of_a_machine_is_reported_in_units_of_1024_bytes(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemFree: 7 kB\nMemAvailable: 2000000 kB\n", "utf-8")
    monkeypatch.setattr(run_device, "Path", lambda _: tmp_path / "meminfo")
    assert free_memory_gb(torch.device("cpu")) == 2.048


@pytest.mark.parametrize("free_gb, rows", [(130, 512), (20, 512), (15, 256), (1.3, 32), (0.5, 32)])
def test_a_gpu_decodes_as_many_rows_as_half_of_its_free_memory_holds(
    monkeypatch, capsys, free_gb, rows
):
    sizes = Qwen2Config(896, 4864, 24, 14, 2, 151936)  # 12,288 bytes a token in half precision
    for name, value in {"mem_get_info": (free_gb * 1e9 - 3, 2e11), "memory_reserved": 5,
                        "memory_allocated": 2}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    found = decoded_rows(torch.device("cuda"), sizes, torch.bfloat16, max_new_tokens=512)
    assert found == rows
    assert f"takes {rows * 1536 * 12288 / 1e9:.1f} of {free_gb:.1f} GB" in capsys.readouterr().out
    assert decoded_rows(torch.device("cpu"), sizes, torch.bfloat16, 512) == 128
