"""Refusals of bad input: cause and remedy in two lines, exit code 2, and no file changed."""

import re
from pathlib import Path

from errors import run_script

TRAIN = "--model base --data data --out out --device cpu --precision fp32 "  # in `workspace`


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """The content of every file below `folder`; None for folders."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(main, flags: str, capsys) -> str:
    """The cause that `main` gives for refusing `flags`; it must not change any file."""
    before = snapshot(Path())
    capsys.readouterr()
    code = run_script(lambda: main(flags.split()))
    bars, error, message = capsys.readouterr().err.partition("error: ")
    assert code == 2 and error, bars
    assert re.fullmatch(r".+\n  .+\n", message) and "Traceback" not in bars, message
    assert snapshot(Path()) == before
    return error + message.splitlines()[0]
