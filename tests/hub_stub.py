"""A stub of the Hub on the loopback interface, and Python processes that know no other Hub."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests import toys

ROOT = Path(__file__).resolve().parents[1]
COMMITS = {"models/toy/qwen2": "1" * 40, "datasets/openai/gsm8k": "2" * 40}
MODEL, COMMIT = "toy/qwen2", COMMITS["models/toy/qwen2"]
REVISIONS = ("main", "v1")  # names of the one commit of each repository
ADDRESS = re.compile(
    r"/(api/)?(?P<type>models/|datasets/)?(?P<name>[^/]+/[^/]+)"
    r"(/(?P<kind>revision|tree|resolve)/(?P<revision>[^/]+)(/(?P<file>.+))?)?"
)
# Commands for `python`, which add their own --out or --adapter.
TRAIN_ON_HUB = (
    "train.py --model toy/qwen2 --data gsm8k --max-steps 2 --precision fp32 --device cpu".split()
)
FEW_ANSWERS = "--precision fp32 --device cpu --limit 2 --max-new-tokens 4".split()


class StubHub(ThreadingHTTPServer):
    """Serves files by repository ("models/owner/name") in the Hub's protocol.

    `fault` replaces the answer to the next `times` requests whose path contains `only`. It is
    (status, error code); or "silence"; or a fraction of the file to send, after which the server
    falls silent or, with `cuts`, closes the connection. `requests` lists the requested paths.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.files, self.requests = files, []
        self.fault, self.only, self.times, self.cuts = None, "", 10**6, False
        self.earlier: list[str] = []  # commits that are not main's any more
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class StubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        fault, is_fraction = self.server.fault, isinstance(self.server.fault, float)
        if self.server.only not in path or is_fraction and self.command == "HEAD":
            fault = None
        if fault is not None:
            self.server.times -= 1
            fault = fault if self.server.times >= 0 else None
        if fault == "silence":
            return self.server.over.wait()
        if isinstance(fault, tuple):
            return self.refuse(*fault)
        address = ADDRESS.fullmatch(path)
        repo = address and (address["type"] or "models/") + address["name"]
        if repo not in self.server.files:
            return self.refuse(401, "RepoNotFound")  # the Hub's answer for unknown repositories
        revision = address["revision"] or "main"
        if revision not in (*REVISIONS, COMMITS[repo], *self.server.earlier):
            return self.refuse(404, "RevisionNotFound")
        files = self.server.files[repo]
        commit = revision if revision in self.server.earlier else COMMITS[repo]
        if address["kind"] == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
                for name, content in files.items()
            ]
            return self.answer(json.dumps(tree).encode())
        if address["kind"] != "resolve":
            siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
            info = {"id": address["name"], "sha": commit, "siblings": siblings}
            return self.answer(json.dumps(info).encode())
        if address["file"] not in files:
            return self.refuse(404, "EntryNotFound")
        content = files[address["file"]]
        about = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": commit}
        return self.answer(content, **about, fraction=fault)

    do_HEAD = do_GET

    def answer(
        self, content: bytes, status: int = 200, *, fraction: float | None = None, **headers: str
    ) -> None:
        if begin := self.headers.get("Range"):
            status, content = 206, content[int(begin.removeprefix("bytes=").partition("-")[0]) :]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            sent = len(content) if fraction is None else int(fraction * len(content))
            self.wfile.write(content[:sent])
        if fraction is not None:
            self.wfile.flush()
            self.close_connection = self.server.cuts or self.server.over.wait()

    def refuse(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": f"no: {code}", "Retry-After": "3600"}
        self.answer(b"{}", status, **headers)

    def log_message(self, *_) -> None:
        pass


def etag(content: bytes) -> str:
    """As on the Hub: SHA-256 of a large file, git's SHA-1 of a small one."""
    if len(content) > 10_000:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def toy_hub(checkpoint: Path, folder: Path) -> StubHub:
    """A hub with a toy checkpoint, a small gsm8k, and files that nobody should request.

    The rows are also in `folder`/sums.
    """
    sums = toys.write_arithmetic(folder / "sums", rows=60, test_rows=4)
    model = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    data = {
        f"main/{split}-00000-of-00001.parquet": rows_as_parquet(sums / f"{split}.jsonl")
        for split in ("train", "test")
    }
    other = {"README.md": b"not needed", "socratic/train-00000-of-00001.parquet": b"not needed"}
    code = {"pytorch_model.bin": b"a pickle", "modeling_qwen2.py": b"code", "a.pkl": b"a pickle"}
    return StubHub(
        {"models/toy/qwen2": model | other | code, "datasets/openai/gsm8k": data | other}
    )


def rows_as_parquet(path: Path) -> bytes:
    """The content of a parquet file with the rows of a JSONL file."""
    return toys.parquet([json.loads(line) for line in path.read_text().splitlines()])


# Processes


def python(*command: object, home: Path, hub: str, **environment: str):
    """Run Python as a user would, with its own cache and with the stub as its only Hub."""
    process = start_python(*command, home=home, hub=hub, **environment)
    out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_python(*command: object, home: Path, hub: str, **environment: str):
    """Like `python`, but returns the running process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(home / "cache"), "HF_ENDPOINT": hub, "OMP_NUM_THREADS": "1",
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=kept | settings | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


FETCH = """
import sys; from errors import run_script; from hub import fetch
repo, revision, repo_type = sys.argv[1], sys.argv[2] or None, sys.argv[3]
patterns = ["*.json", "*.safetensors", "main/*.parquet"]
sys.exit(run_script(lambda: print(
    fetch(repo, patterns=patterns, revision=revision, repo_type=repo_type)
)))
"""


def fetch(repo: str, revision: str = "", repo_type: str = "model", **options):
    """Run `hub.fetch` in a process of its own, which need not import torch."""
    return python("-c", FETCH, repo, revision, repo_type, **options)


# Downloads


WEIGHTS = f"snapshots/{COMMIT}/model.safetensors"


def is_complete(hub: StubHub, home: Path) -> bool:
    """Whether the cache below `home` holds the stub's weights."""
    (weights,) = home.glob(f"cache/hub/*/{WEIGHTS}")
    return weights.read_bytes() == hub.files["models/toy/qwen2"]["model.safetensors"]


def kill_while_downloading(hub: StubHub, home: Path, fraction: float) -> None:
    """Kill a process that has received `fraction` of the weights and is waiting for the rest."""
    hub.fault, hub.only, hub.times = fraction, "/resolve/" + COMMIT + "/model.safetensors", 1
    process = start_python("-c", FETCH, MODEL, "", "model", home=home, hub=hub.url)
    deadline = time.monotonic() + 50
    while hub.times and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.kill()
    process.communicate()
    assert process.returncode == -9 and not hub.times
