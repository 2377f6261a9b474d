"""The long form of tests/test_hub.py: every fault in every part of a download."""

import time

import pytest

from tests.hub_stub import MODEL, fetch, is_complete, kill_while_downloading

pytestmark = pytest.mark.campaign

INFO, TREE, FILE = "/qwen2/revision", "/tree/", "/resolve/"
FAULTS = [(401, "RepoNotFound"), (403, "GatedRepo"), (404, "RepoNotFound"), (404, "EntryNotFound"),
          (404, "RevisionNotFound"), (429, ""), (500, ""), (503, ""), "silence"]  # fmt: skip


@pytest.mark.parametrize("only", ["", "/api/", TREE, FILE])
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_every_fault_is_reported_within_a_minute_wherever_it_occurs(hub, tmp_path, fault, only):
    hub.fault, hub.only = fault, only
    started = time.monotonic()
    result = fetch(MODEL, home=tmp_path, hub=hub.url)
    assert time.monotonic() - started < 60
    lines = result.stderr.partition("error: ")[2].splitlines()
    assert result.returncode == 2 and len(lines) == 2 and lines[1].startswith("  "), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_stops_arriving_is_refused_within_a_minute_and_completed_later(
    hub, tmp_path, fraction
):
    hub.fault, hub.only = fraction, "/model.safetensors"
    started = time.monotonic()
    result = fetch(MODEL, home=tmp_path, hub=hub.url)
    assert time.monotonic() - started < 60 and result.returncode == 2, result.stderr
    hub.fault = None
    result = fetch(MODEL, home=tmp_path, hub=hub.url)
    assert result.returncode == 0 and is_complete(hub, tmp_path), result.stderr


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_a_killed_download_is_completed_by_the_next_start(hub, tmp_path, fraction):
    kill_while_downloading(hub, tmp_path, fraction)
    result = fetch(MODEL, home=tmp_path, hub=hub.url)
    assert result.returncode == 0 and is_complete(hub, tmp_path), result.stderr


def test_a_hub_that_takes_five_seconds_for_each_answer_is_waited_for(hub, tmp_path):
    finish_request = hub.finish_request

    def slowly(request, address):
        time.sleep(5)
        finish_request(request, address)

    hub.finish_request = slowly
    result = fetch(MODEL, home=tmp_path, hub=hub.url)
    assert result.returncode == 0 and is_complete(hub, tmp_path), result.stderr
