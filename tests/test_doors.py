"""Tests of the doors: users' paths, other people's texts on the terminal, closed streams."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from tqdm import tqdm

import evaluate
import train
from report import __main__ as report
from run import base as run_base
from run import export
from terminal import Screen, printable
from tests.campaign.harness import results, run
from tests.refusals import refused, training
from tests.scripts import ROOT, script

# Users' paths

PATHS = {  # a path -> what is said about it
    "pipe": "pipe is a named pipe",
    "socket": "socket is a socket",
    "/dev/null": "/dev/null is a device",
    "x" * 300: "File name too long",
    "a\0b": "embedded null",
    "rows.jsonl/inside": "Not a directory",
    "loop": "Too many levels of symbolic links",
    "closed": "closed is not readable",
}
EVALUATE = "--adapter run/best --device cpu --precision fp32"
FLAGS = {  # an option -> the script that it is of, and its other options
    "--model": (train.main, training("")),
    "--data": (train.main, training("").replace("--data data", "")),
    "--from-adapter": (train.main, training("")),
    "--chat-template": (train.main, training("")),
    "--config": (train.main, training("")),
    "--adapter": (evaluate.main, ""),
    "--compare": (evaluate.main, ""),
    "--keep-correct": (evaluate.main, f"{EVALUATE} --split train"),
    "--model ": (evaluate.main, EVALUATE),
    "--adapter ": (export.main, "--out merged"),
    "--run": (report.main, ""),
}


@pytest.fixture
def odd_paths(workspace, monkeypatch):
    """The working directory, with something at each of `PATHS`."""
    os.mkfifo("pipe")
    socket.socket(socket.AF_UNIX).bind("socket")
    Path("rows.jsonl").write_text("{}\n")
    os.symlink("loop", "loop")
    Path("closed").mkdir()
    access = os.access  # the superuser may read everything
    monkeypatch.setattr(os, "access", lambda path, *a: path != "closed" and access(path, *a))
    return workspace


@pytest.mark.parametrize("flag", FLAGS)
def test_a_path_that_is_none_is_refused_by_every_option_in_two_lines(odd_paths, flag, capsys):
    main, others = FLAGS[flag]
    for path, cause in PATHS.items():
        if flag == "--keep-correct" and path in (
            "pipe",
            "socket",
            "/dev/null",
            "closed",
            "rows.jsonl/inside",
        ):
            cause = "is not a .jsonl file"
        said = refused(main, f"{others} {flag.strip()}={path}", capsys)
        assert cause in said and len(said) < 1000, path


@pytest.mark.parametrize("name", ["~/base", "~/best", "~/template"])
def test_a_tilde_in_a_path_is_the_home_folder(workspace, monkeypatch, capsys, name):
    monkeypatch.setenv("HOME", str(workspace / "home"))
    (workspace / "home").mkdir()
    flag = {"base": "--model", "best": "--from-adapter", "template": "--chat-template"}[name[2:]]
    said = refused(train.main, training(f"{flag}={name}"), capsys)
    assert str(workspace / "home") in said


# Other people's texts


def test_every_invisible_character_is_printed_as_its_escape_and_no_other():
    for code in range(sys.maxunicode + 1):
        c = chr(code)
        invisible = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        assert printable(c) == (c.encode("unicode_escape").decode() if invisible else c)
    shown = printable("\x1b[2J \u202egpj.exe \u200b\u2066\u061c\ud800\u3000é", keep="\t")
    assert shown == "\\x1b[2J \\u202egpj.exe \\u200b\\u2066\\u061c\\ud800\u3000é"


def test_a_stranger_s_names_and_texts_reach_the_terminal_only_as_escapes(tiny, tmp_path):
    evil = "\x1b[2J\x1b]0;title\x07\u202e\u200b\r"
    data = tmp_path / f"{evil}.jsonl"
    rows = [{"question": f"{evil} {i} + 1?", "answer": f"{i + 1}", evil: 1} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows + [{evil: evil}] * 0))
    flags = [*tiny[:2], "--data", data, *tiny[4:], "--max-steps", 1]
    for more in ([], ["--show-example"], ["--epochs", 0]):
        ended = run([*flags, *more], tmp_path / "run")
        assert ended.code == (2 if "--epochs" in more else 0), ended
        for text in (ended.out, ended.err):
            assert not [c for c in text if c not in "\n\t" and printable(c) != c]
        assert more == ["--epochs", 0] or "\\x1b[2J" in ended.out and "\\u202e" in ended.out


def test_the_drawing_of_progress_bars_passes_a_screen_unchanged_and_their_texts_as_escapes():
    drawn = []
    quick = {"mininterval": 0, "miniters": 1, "ncols": 40, "bar_format": "{desc}{bar}{n}"}
    for screen in (lambda s: s, lambda s: Screen(s, bars=True)):
        stream = io.StringIO()
        with tqdm(total=3, file=screen(stream), **quick) as outer:
            for _ in range(3):
                list(tqdm(range(2), file=outer.fp, leave=False, **quick))
                outer.update()
        drawn.append(stream.getvalue())
    assert drawn[0] == drawn[1] and "\x1b[A" in drawn[0]
    stream = io.StringIO()
    Screen(stream, bars=True).write("\rname\x1b[2J\r")
    assert stream.getvalue() == "\rname\\x1b[2J\\r"


# Closed streams


def test_a_training_whose_output_was_closed_by_the_shell_has_the_same_results(
    short, expected, tmp_path
):
    words = " ".join(f"'{flag}'" for flag in [sys.executable, "train.py", *short])
    for name, streams in (("both", ">&- 2>&-"), ("input", "<&- >&-")):
        out = tmp_path / name
        command = f"OMP_NUM_THREADS=1 {words} --out {out} {streams}"
        done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, timeout=100)
        assert (done.returncode, done.stdout) == (0, b"") and b"Traceback" not in done.stderr
        assert results(out) == expected


@pytest.mark.parametrize("streams", [[1], [1, 2]])
def test_a_training_whose_output_cannot_be_written_is_not_lost(short, expected, tmp_path, streams):
    def full():
        for number in streams:
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)

    ended = run(short, tmp_path / "run", fault=full)
    assert ended.code == 1 and results(tmp_path / "run") == expected
    if streams == [1]:
        assert "what was printed is incomplete: [Errno 28]" in ended.two_line_error()


# Ctrl-C in the first seconds

# A shell starts background jobs with SIGINT ignored, and Python leaves it so.
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
WHILE_IMPORTING = """
import os, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "tokenizers": os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


def test_ctrl_c_during_the_imports_ends_with_130_and_without_a_traceback(short, tmp_path):
    ended = script("train.py", [*short, "--out", tmp_path / "run"], before=LISTEN + WHILE_IMPORTING)
    assert ended.returncode in (130, -2) and ended.stderr == "interrupted\n"


@pytest.mark.parametrize("function, seconds", [("hash_base", 100), ("load_model", 0)])
def test_ctrl_c_while_hashing_or_loading_ends_with_130_and_without_a_traceback(
    short, tmp_path, function, seconds
):
    def interrupted():
        def interrupt(*_, **__):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(seconds)  # in the thread that hashes

        setattr(run_base, function, interrupt)

    ended = run(short, tmp_path / "run", fault=interrupted)
    assert ended.code in (130, -2) and ended.err == "interrupted\n" and ended.seconds < 90
