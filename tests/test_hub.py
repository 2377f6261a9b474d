"""Laws of the Hub: a stub of it on the loopback serves a toy checkpoint and a small gsm8k."""

import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest

from tests import toys

ROOT = Path(__file__).resolve().parents[1]
COMMITS = {"models/toy/qwen2": "1" * 40, "datasets/openai/gsm8k": "2" * 40}
REVISIONS = ("main", "v1")  # of each repository, beside its commit
ADDRESS = re.compile(
    r"/(api/)?(?P<of>models/|datasets/)?(?P<name>[^/]+/[^/]+)"
    r"(/(?P<kind>revision|tree|resolve)/(?P<revision>[^/]+)(/(?P<file>.+))?)?"
)


class StubHub(ThreadingHTTPServer):
    """Files by repository ("models/owner/name"), answered as the Hub does.

    `fault` is what is done instead, the next `times` that an address is asked for which holds
    `only`: a status with its code, "silence", or a share of the file, after which it falls silent
    or, if `cuts`, hangs up. What was asked for is in `requests`.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.files, self.requests = files, []
        self.fault, self.only, self.times, self.cuts = None, "", 10**6, False
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class StubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        fault, is_share = self.server.fault, isinstance(self.server.fault, float)
        if self.server.only not in path or is_share and self.command == "HEAD":
            fault = None
        if fault is not None:
            self.server.times -= 1
            fault = fault if self.server.times >= 0 else None
        if fault == "silence":
            return self.server.over.wait()
        if isinstance(fault, tuple):
            return self.refuse(*fault)
        asked = ADDRESS.fullmatch(path)
        repo = asked and (asked["of"] or "models/") + asked["name"]
        if repo not in self.server.files:
            return self.refuse(401, "RepoNotFound")  # as the Hub answers those it does not know
        if (asked["revision"] or "main") not in (*REVISIONS, COMMITS[repo]):
            return self.refuse(404, "RevisionNotFound")
        files = self.server.files[repo]
        if asked["kind"] == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
                for name, content in files.items()
            ]
            return self.answer(json.dumps(tree).encode())
        if asked["kind"] != "resolve":
            siblings = [{"rfilename": name} for name in files]
            info = {"id": asked["name"], "sha": COMMITS[repo], "siblings": siblings}
            return self.answer(json.dumps(info).encode())
        if asked["file"] not in files:
            return self.refuse(404, "EntryNotFound")
        content = files[asked["file"]]
        about = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMITS[repo]}
        return self.answer(content, **about, share=fault)

    do_HEAD = do_GET

    def answer(
        self, content: bytes, status: int = 200, *, share: float | None = None, **headers: str
    ) -> None:
        if begin := self.headers.get("Range"):
            status, content = 206, content[int(begin.removeprefix("bytes=").partition("-")[0]) :]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content if share is None else content[: int(share * len(content))])
        if share is not None:
            self.wfile.flush()
            self.close_connection = self.server.cuts or self.server.over.wait()

    def refuse(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": f"no: {code}", "Retry-After": "3600"}
        self.answer(b"{}", status, **headers)

    def log_message(self, *_) -> None:
        pass


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def parquet(path: Path) -> bytes:
    """The rows of a JSONL file as a parquet file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture
def hub(lively_checkpoint, tmp_path):
    sums = toys.write_arithmetic(tmp_path / "sums", rows=60, test_rows=4)
    model = {file.name: file.read_bytes() for file in lively_checkpoint.iterdir()}
    data = {
        f"main/{split}-00000-of-00001.parquet": parquet(sums / f"{split}.jsonl")
        for split in ("train", "test")
    }
    other = {"README.md": b"not asked for", "socratic/train-00000-of-00001.parquet": b"nor this"}
    code = {"pytorch_model.bin": b"a pickle", "modeling_qwen2.py": b"code", "a.pkl": b"a pickle"}
    stub = StubHub(
        {"models/toy/qwen2": model | other | code, "datasets/openai/gsm8k": data | other}
    )
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield stub
    stub.over.set()
    stub.shutdown()
    stub.server_close()


def python(*command: object, home: Path, hub: str, **environment: str):
    """Run Python as a user would, with its own cache and no Hub but the stub."""
    process = python_process(*command, home=home, hub=hub, **environment)
    out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def python_process(*command: object, home: Path, hub: str, **environment: str):
    """The same, still running."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(home / "cache"), "HF_ENDPOINT": hub, "OMP_NUM_THREADS": "1",
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=kept | settings | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


TOY = "train.py --model toy/qwen2 --data gsm8k --max-steps 2 --precision fp32 --device cpu".split()
FEW = "--precision fp32 --device cpu --limit 2 --max-new-tokens 4".split()
MODEL, COMMIT = "toy/qwen2", COMMITS["models/toy/qwen2"]


def test_a_hub_id_and_gsm8k_are_fetched_and_trained_on_and_again_offline(hub, tmp_path):
    out, place = tmp_path / "run", {"home": tmp_path, "hub": hub.url}
    first = python(*TOY, "--out", out, **place)
    assert first.returncode == 0, first.stderr
    assert all(commit in first.stdout for commit in COMMITS.values())
    identity = json.loads((out / "config.json").read_text())["identity"]
    assert [identity["base_commit"], identity["data_commit"]] == list(COMMITS.values())
    adapter = json.loads((out / "best" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (MODEL, COMMIT)
    assert any(path.endswith(f"/resolve/{COMMIT}/model.safetensors") for path in hub.requests)
    not_asked_for = ("README", "socratic", ".bin", ".py", ".pkl")
    assert not any(part in path for path in hub.requests for part in not_asked_for)

    hub.requests.clear()
    second = python(*TOY, "--out", tmp_path / "again", **place, HF_HUB_OFFLINE="1")
    assert second.returncode == 0, second.stderr
    weights = "best/adapter_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    third = python("evaluate.py", "--adapter", out / "best", *FEW, **place, HF_HUB_OFFLINE="1")
    assert third.returncode == 0, third.stderr
    assert "base" in third.stdout and "tuned" in third.stdout
    assert hub.requests == []


FETCH = """
import sys; from errors import run_script; from hub import fetch
repo, revision, repo_type = sys.argv[1], sys.argv[2] or None, sys.argv[3]
patterns = ["*.json", "*.safetensors", "main/*.parquet"]
sys.exit(run_script(lambda: print(
    fetch(repo, patterns=patterns, revision=revision, repo_type=repo_type)
)))
"""


def fetch(repo: str, revision: str = "", repo_type: str = "model", **options):
    """`hub.fetch` in a process of its own, without waiting for torch."""
    return python("-c", FETCH, repo, revision, repo_type, **options)


@pytest.mark.parametrize("revision", ["", "v1", COMMIT])
def test_a_cached_copy_is_used_and_said_so_where_there_is_no_answer(hub, tmp_path, revision):
    place = {"home": tmp_path, "hub": hub.url}
    once = fetch(MODEL, revision, **place)
    assert once.returncode == 0 and once.stdout.strip().endswith(COMMIT), once.stderr
    hub.fault = (500, "")
    later = fetch(MODEL, revision, **place)
    assert later.returncode == 0, later.stderr
    assert f"using the cached copy of model {MODEL}" in later.stdout
    assert later.stdout.splitlines()[-1] == once.stdout.splitlines()[-1]


def test_a_copy_that_lacks_files_is_not_used(hub, tmp_path):
    place = {"home": tmp_path, "hub": hub.url}
    folder = Path(fetch(MODEL, **place).stdout.strip())
    (folder / "tokenizer.json").unlink()
    result = fetch(MODEL, **place, HF_HUB_OFFLINE="1")
    assert result.returncode == 2 and "is not in the cache" in result.stderr
    assert fetch(MODEL, **place).returncode == 0 and (folder / "tokenizer.json").exists()


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    "fault, asked, cause",
    [
        (None, ["toy/missing"], "model toy/missing was not found on the Hub"),
        ((404, "RepoNotFound"), [MODEL], "model toy/qwen2 was not found on the Hub"),
        (None, [MODEL, "v9"], "model toy/qwen2 at revision v9 does not exist"),
        (None, [MODEL, "9" * 40], f"model toy/qwen2 at revision {'9' * 40} does not exist"),
        (None, ["openai/gsm8k", "v9", "dataset"], "dataset openai/gsm8k at revision v9 does not"),
        ((403, "GatedRepo"), [MODEL], "model toy/qwen2 is gated"),
        ((401, "GatedRepo"), [MODEL], "model toy/qwen2 is gated"),
        ((429, ""), [MODEL], "the Hub has had too many requests, and gives no model toy/qwen2"),
        ((500, ""), [MODEL], "the Hub could not be reached for model toy/qwen2"),
        ("nothing listens", [MODEL], "the Hub could not be reached for model toy/qwen2"),
        ("offline", [MODEL], "model toy/qwen2 is not in the cache, and HF_HUB_OFFLINE is set"),
        (None, ["toy/qwen 2?"], "the Hub refused model toy/qwen 2?"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_two_lines_and_soon(
    hub, tmp_path, fault, asked, cause
):
    hub.fault = fault if isinstance(fault, tuple) else None
    offline = {"HF_HUB_OFFLINE": "1"} if fault == "offline" else {}
    url = f"http://127.0.0.1:{closed_port()}" if fault == "nothing listens" else hub.url
    started = time.monotonic()
    result = fetch(*asked, home=tmp_path, hub=url, **offline)
    assert time.monotonic() - started < 60 and result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: " + cause), result.stderr
    assert lines[1].startswith("  ")


def test_a_run_without_the_hub_ends_before_it_begins(tmp_path):
    nowhere = f"http://127.0.0.1:{closed_port()}"
    result = python(*TOY, "--out", tmp_path / "run", home=tmp_path, hub=nowhere)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 2, result.stderr
    assert not (tmp_path / "run").exists()


# Faults that pass


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("only", ["/api/models/toy/qwen2", "/resolve/"])
def test_a_hub_that_is_busy_or_broken_is_asked_again(hub, tmp_path, status, only):
    hub.fault, hub.only, hub.times = (status, ""), only, 2
    result = fetch(MODEL, home=tmp_path, hub=hub.url)
    assert result.returncode == 0, result.stderr
    assert hub.times < 0 and result.stdout.strip().endswith(COMMIT)


WEIGHTS = f"snapshots/{COMMIT}/model.safetensors"


def is_whole(hub: StubHub, home: Path) -> bool:
    """Whether the cache below `home` holds the stub's weights."""
    (weights,) = home.glob(f"cache/hub/*/{WEIGHTS}")
    return weights.read_bytes() == hub.files["models/toy/qwen2"]["model.safetensors"]


def kill_while_downloading(hub: StubHub, home: Path, share: float) -> None:
    """Kill a process that has `share` of the weights and waits for the rest."""
    hub.fault, hub.only, hub.times = share, "/resolve/" + COMMIT + "/model.safetensors", 1
    process = python_process("-c", FETCH, MODEL, "", "model", home=home, hub=hub.url)
    give_up = time.monotonic() + 50
    while hub.times and time.monotonic() < give_up:
        time.sleep(0.05)
    time.sleep(0.2)
    process.kill()
    process.communicate()
    assert process.returncode == -9 and not hub.times


def test_a_download_killed_half_way_is_completed_by_the_next_start(hub, tmp_path):
    kill_while_downloading(hub, tmp_path, 0.5)
    assert not list(tmp_path.glob(f"cache/hub/*/{WEIGHTS}"))
    result = fetch(MODEL, home=tmp_path, hub=hub.url)
    assert result.returncode == 0 and is_whole(hub, tmp_path), result.stderr


def test_a_download_that_is_cut_off_goes_on_by_itself(hub, tmp_path):
    hub.fault, hub.only, hub.times, hub.cuts = 0.5, "/model.safetensors", 2, True
    result = fetch(MODEL, home=tmp_path, hub=hub.url)
    assert result.returncode == 0 and is_whole(hub, tmp_path), result.stderr
    assert hub.times < 0


# Without a network


OFFLINE = """
import sys
sys.addaudithook(lambda event, args: event.startswith("socket.") and print("opened", event))
"""


def test_offline_a_full_cache_is_used_without_a_socket_and_an_empty_one_says_what_to_bring(
    hub, tmp_path
):
    place = {"home": tmp_path, "hub": hub.url}
    assert (
        "opened socket.connect" in python("-c", OFFLINE + FETCH, MODEL, "", "model", **place).stdout
    )
    offline = place | {"HF_HUB_OFFLINE": "1"}
    again = python("-c", OFFLINE + FETCH, MODEL, "", "model", **offline)
    assert again.returncode == 0 and "opened" not in again.stdout, again.stdout + again.stderr
    command = ["train.py", "--model", MODEL, "--data", tmp_path / "sums", "--out", tmp_path / "run"]
    nothing = python(*command, **offline | {"home": tmp_path / "empty"})
    assert nothing.returncode == 2
    last = nothing.stderr.splitlines()[-1]
    assert all(name in last for name in ("config.json", "tokenizer.json", "*.safetensors"))


# Secrets


def test_a_planted_secret_is_in_no_output_and_no_file(hub, tmp_path):
    url = hub.url.replace("//", "//me:sesame-word@")
    place = {"home": tmp_path, "hub": url, "HF_TOKEN": "hf_" + "sesame" * 5}
    hub.fault, hub.only, hub.times = (503, ""), "/tree/", 1  # of which the client would warn
    runs = [python(*TOY, "--out", tmp_path / "run", **place)]
    assert runs[0].returncode == 0 and hub.times < 0, runs[0].stderr
    hub.only, hub.times = "", 10**6
    for fault in ((403, "GatedRepo"), (400, ""), (503, "")):
        hub.fault = fault
        runs.append(fetch("toy/other", **place))
    runs.append(python("train.py", "--model", "https://me:sesame-word@hub/toy/qwen2", **place))
    runs.append(
        fetch("toy/other", **place | {"hub": f"http://me:sesame-word@127.0.0.1:{closed_port()}"})
    )
    assert all(run.returncode == 2 for run in runs[1:])
    said = "".join(run.stdout + run.stderr for run in runs)
    assert "sesame" not in said, said
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 20 and not any(b"sesame" in p.read_bytes() for p in files)
