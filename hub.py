"""Fetching files from the Hugging Face Hub, with errors a person can act on.

`HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN` mean what they mean everywhere. Imported
by every room; the Hub's client is imported only to fetch something, since a local run needs none.
"""

import json
import stat
from pathlib import Path
from typing import Any

from errors import HubError

LARGEST_JSON = 2**26  # bytes; the largest that are published, tokenizers, have a sixth of that


def read_json(path: Path) -> Any:
    """The JSON in a file that nobody vouches for; OSError or ValueError if it cannot be read."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST_JSON:
        raise ValueError(f"it is no file of at most {LARGEST_JSON:,} bytes")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def fetch(
    repo: str, *, patterns: list[str], revision: str | None = None, repo_type: str = "model"
) -> Path:
    """The folder with the files of `repo` that match `patterns`; its name is the resolved commit.

    Downloads what the cache lacks, with progress bars. Where the Hub cannot be reached, a complete
    cached copy is used and said so. Raises HubError otherwise.
    """
    from huggingface_hub import HfApi, snapshot_download

    what = f"{repo_type} {repo}" + (f" at revision {revision}" if revision else "")
    wanted = {"revision": revision, "repo_type": repo_type, "allow_patterns": patterns}
    try:
        HfApi().repo_info(repo, revision=revision, repo_type=repo_type, timeout=20)
        return Path(snapshot_download(repo, **wanted))
    except Exception as error:  # the client raises its own, its HTTP library's, and the system's
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (400, 401, 403, 404) or isinstance(error, ValueError):
            raise _refused(what, error, status) from error
        try:
            folder = Path(snapshot_download(repo, local_files_only=True, **wanted))
        except Exception:  # nothing usable in the cache: the first error is the cause
            raise _unreachable(what, error, patterns) from error
        print(f"the Hub gave no answer ({_reason(error)}): using the cached copy of {what}")
        return folder


def _reason(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        if str(error)
        else type(error).__name__
    )


def _refused(what: str, error: Exception, status: int | None) -> HubError:
    kind = type(error).__name__
    if "Gated" in kind or status == 403:
        return HubError(
            f"{what} is gated: the Hub asks who you are",
            "accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN",
        )
    if "Revision" in kind:
        return HubError(
            f"{what} does not exist", "leave the revision out, or give a branch, tag or commit"
        )
    if status in (401, 404):
        return HubError(
            f"{what} was not found on the Hub, or is private",
            "check the spelling (owner/name), give a folder, or log in with `hf auth login`",
        )
    return HubError(f"the Hub refused {what}: {_reason(error)}", "check the name and the revision")


def _unreachable(what: str, error: Exception, patterns: list[str]) -> HubError:
    if "Offline" in type(error).__name__:
        return HubError(
            f"{what} is not in the cache, and HF_HUB_OFFLINE is set",
            f"unset it once to download, or give a folder that holds {', '.join(patterns)}",
        )
    return HubError(
        f"the Hub could not be reached for {what} ({_reason(error)})",
        "check the network and start again, or give a local folder instead of a Hub name",
    )
