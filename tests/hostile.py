"""Hostile files: loading them within limits of time and memory, and random damage to weights."""

import contextlib
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from errors import BadAdapter, BadCheckpoint, UserError
from lora.peft_format import WEIGHTS, read_adapter
from model.load import load_model

GB = 2**30


@contextlib.contextmanager
def limited(seconds: float, memory: int = GB) -> Iterator[None]:
    """Fail if the block takes longer than `seconds`; allocations of more than `memory` bytes above
    the present size of the process fail inside it.
    """
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, before[1]))
    started = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < seconds


def refusal(load: Callable, kind: type[UserError], seconds: float = 2) -> str:
    """The cause that `load` gives for its refusal: in two printable lines, soon, in little
    memory.
    """
    with pytest.raises(kind) as caught, limited(seconds):
        load()
    lines = str(caught.value).split("\n")
    assert len(lines) == 2 and all(line and line.isprintable() for line in lines), lines
    assert caught.value.exit_code == 2
    return caught.value.cause


def load_base(folder: Path):
    return load_model(folder, dtype=torch.float32)


def mutated(content: bytes, seed: int) -> bytes:
    """`content` of a safetensors file with one to a few random changes, most in the header."""
    rng = random.Random(seed)
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        header = 8 + int.from_bytes(content[:8], "little")
        at = rng.randrange(8, max(9, min(header, len(changed) - 1)))
        match rng.randrange(8):
            case 0:
                changed[rng.randrange(8)] = rng.randrange(256)
            case 1 | 2:
                changed[at : at + 1] = bytes([rng.choice(b'0123456789{}[]",:-\\eE\0\xff')])
            case 3:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 4:
                changed[at:at] = rng.choice((b"9" * 20, b"-", b"null", b"{", b'"', b"[]", b"\n"))
            case 5:
                del changed[at : at + rng.randrange(1, 40)]
            case 6:
                del changed[rng.randrange(len(changed) + 1) :]
            case 7:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        changed += bytes(max(0, 10 - len(changed)))
    return bytes(changed)


def load_mutated(base: Path, adapter: Path, seeds: range) -> dict[str, int]:
    """Load mutated weights of a base and of an adapter, once per seed; how many were refused, and
    how many were loaded. Anything else fails.
    """
    files = {
        base / "model.safetensors": lambda: load_base(base),
        adapter / WEIGHTS: lambda: read_adapter(adapter, load_base(base)),
    }
    outcomes = {"refused": 0, "loaded": 0}
    for path, load in files.items():
        intact = path.read_bytes()
        for seed in seeds:
            path.unlink()  # the previous file may still be mapped
            path.write_bytes(mutated(intact, seed))
            try:
                with limited(seconds=2):
                    load()
                outcomes["loaded"] += 1
            except (BadCheckpoint, BadAdapter) as error:
                assert len(str(error).split("\n")) == 2, (seed, str(error))
                outcomes["refused"] += 1
        path.unlink()
        path.write_bytes(intact)
    return outcomes
