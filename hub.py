"""Fetching files from the Hugging Face Hub, with errors a person can act on.

`HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN` have their usual meaning. The Hub's client
is imported only when something is fetched, since a local run does not need it.
"""

import hashlib
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from errors import HubError, UserError, plain
from files import mapped
from progress_bar import progress_bar

BLOB = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # the name of a file's content in the cache
TRIES, TIMEOUT = 3, 7  # consecutive requests for one URL; seconds without a byte


def fetch(
    repo: str,
    *,
    patterns: list[str],
    choose: Callable[[list[str]], list[str]] | None = None,
    revision: str | None = None,
    repo_type: str = "model",
) -> Path:
    """The folder with the files of `repo` that match `patterns`; its name is the resolved commit.

    Downloads what the cache lacks, with a line that says what and how much, and a progress bar. If
    the Hub cannot be reached, a complete cached copy is used, and a line says so.

    Args:
        choose: makes the patterns from the names of all files in the repository (offline: in the
            cache), for callers whose patterns depend on them. Its errors are raised as they are.

    Raises:
        HubError: the files can be had neither from the Hub nor from the cache.
    """
    from huggingface_hub import HfApi, snapshot_download

    what = f"{repo_type} {repo}" + (f" at revision {revision}" if revision else "")
    wanted = {"revision": revision, "repo_type": repo_type, "allow_patterns": patterns}
    # Its warnings contain whole URLs, including credentials.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with _bounded_waiting():
        for wait in (1, 2, 0):
            try:
                info = HfApi().repo_info(
                    repo, revision=revision, repo_type=repo_type, files_metadata=True
                )
                if choose:
                    wanted["allow_patterns"] = choose([f.rfilename for f in info.siblings or ()])
                announce(what, repo, info, wanted)
                folder = Path(snapshot_download(repo, tqdm_class=download_bar, **wanted))
                return _checked(folder, wanted)
            except UserError:
                raise
            except Exception as error:  # the client's own, its HTTP library's, or the system's
                failure = error
            status = getattr(getattr(failure, "response", None), "status_code", 0)
            if status in (400, 401, 403, 404) or isinstance(failure, ValueError):
                raise _refused(what, failure, status) from failure
            if not wait or status < 429:
                break
            print(f"the Hub answered {status} for {what}: trying again in {wait} s", flush=True)
            time.sleep(wait)
    try:
        if choose:
            bare = wanted | {"allow_patterns": []}  # only to learn where the cached snapshot is
            there = Path(snapshot_download(repo, local_files_only=True, **bare))
            names = [p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()]
            wanted["allow_patterns"] = choose(names)
        folder = Path(snapshot_download(repo, local_files_only=True, **wanted))
    except UserError:
        raise
    except Exception:  # nothing usable in the cache: the first error is the cause
        raise _unreachable(what, failure, patterns) from failure
    print(plain(f"the Hub did not answer ({_reason(failure)}): using the cached copy of {what}"))
    return _checked(folder, wanted)


def announce(what: str, repo: str, info: Any, wanted: dict[str, Any]) -> None:
    """Print how many files and bytes the cache lacks, and where they come from; nothing if none.

    `info` is the Hub's about the repository, with the sizes of its files.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    kind = wanted["repo_type"]
    lacking = [
        name for name in filter_repo_objects(sizes, allow_patterns=wanted["allow_patterns"])
        if not isinstance(try_to_load_from_cache(repo, name, None, info.sha, kind), str)
    ]  # fmt: skip
    if lacking:
        size = tqdm.format_sizeof(sum(sizes[name] for name in lacking), "B")
        files = "1 file" if len(lacking) == 1 else f"{len(lacking)} files"
        print(plain(f"downloading {what}: {files}, {size}, from {constants.ENDPOINT}"), flush=True)


def download_bar(*args: Any, **options: Any) -> tqdm:
    """One of the bars that the client makes: only the one that counts written bytes is shown."""
    shown = options.get("unit") == "B" and options.get("desc") != "Downloading bytes"
    bar = progress_bar(*args, **options | {"desc": "download", "bar_format": None},
                       disable=not shown)  # fmt: skip
    bar.set_description = lambda *_, **__: None  # the client's words are longer than the bar
    return bar


def _checked(folder: Path, wanted: dict) -> Path:
    """The folder, after a check of its files; `run/base.py` checks large weights, in a thread."""
    found = (path for pattern in wanted["allow_patterns"] for path in folder.glob(pattern))
    check_blobs(path for path in found if path.suffix != ".safetensors")
    return folder


def check_blobs(paths: Iterable[Path]) -> None:
    """Raise HubError for files of the Hub's cache whose content is not the one they are named by.

    The cache names a content by its SHA-256, or a small one by git's SHA-1 of it, and a snapshot's
    files are links to these. Other files are not checked: nothing says what they should hold.
    """
    for path in paths:
        blob = path.resolve()
        if blob.parent.name != "blobs" or not BLOB.fullmatch(blob.name):
            continue
        with mapped(blob) as data:
            if len(blob.name) == 64:
                found = hashlib.sha256(data)
            else:
                found = hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
                found.update(data)
        if found.hexdigest() != blob.name:
            raise HubError(
                f"{path} is damaged: the Hub's cache holds other bytes than were downloaded",
                f"delete {blob}, then rerun the command to download it again",
            )


@contextmanager
def _bounded_waiting() -> Iterator[None]:
    """Limits the client's waiting for a silent or busy Hub to a minute.

    By default it waits forever for a list of files, and as long as a busy Hub asks it to.
    """
    from huggingface_hub import get_session

    requests: Counter[str] = Counter()  # consecutive ones, by URL

    def before(request) -> None:
        address = str(request.url).partition("?")[0]
        if requests[address] == TRIES:
            raise ConnectionError(f"requested {address} {TRIES} times")
        requests[address] += 1
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = dict.fromkeys(kinds, TIMEOUT)

    def after(response) -> None:
        if response.status_code < 400:
            del requests[str(response.request.url).partition("?")[0]]
        for name in ("Retry-After", "RateLimit"):
            response.headers.pop(name, None)

    hooks = get_session().event_hooks
    hooks["request"].append(before)
    hooks["response"].append(after)
    try:
        yield
    finally:
        hooks["request"].remove(before)
        hooks["response"].remove(after)


def _reason(error: Exception) -> str:
    text = plain(str(error).partition("\n")[0])  # hide secrets before cutting: half of one is one
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__


def _refused(what: str, error: Exception, status: int | None) -> HubError:
    kind = type(error).__name__
    if "Gated" in kind or status == 403:
        return HubError(
            f"{what} is gated: the Hub requires a login",
            "accept its terms on its Hub page, then log in with `hf auth login` or set HF_TOKEN",
        )
    if "Revision" in kind:
        return HubError(
            f"{what} does not exist",
            "leave out the revision, or give an existing branch, tag or commit",
        )
    if status in (401, 404):
        return HubError(
            f"{what} was not found on the Hub, or is private",
            "check the spelling (owner/name), give a folder, or log in with `hf auth login`",
        )
    return HubError(f"the Hub refused {what}: {_reason(error)}", "check the name and the revision")


def _unreachable(what: str, error: Exception, patterns: list[str]) -> HubError:
    if getattr(getattr(error, "response", None), "status_code", 0) == 429:
        return HubError(
            f"the Hub refuses {what}: too many requests",
            "wait a few minutes and try again; a login (`hf auth login`) raises the limit",
        )
    if "Offline" in type(error).__name__:
        return HubError(
            f"{what} is not in the cache, and HF_HUB_OFFLINE is set",
            f"unset it once to download, or give a folder that holds {', '.join(patterns)}",
        )
    return HubError(
        f"the Hub could not be reached for {what} ({_reason(error)})",
        "check the network and try again, or give a local folder instead of a Hub name",
    )
