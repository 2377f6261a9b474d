"""The long form of tests/test_json_door.py: 1,000 mutations of the JSON files of a run."""

import pytest

from tests.mutations import check_mutations

pytestmark = pytest.mark.campaign


def test_no_script_has_a_traceback_after_1000_mutations_of_json_files(
    evaluated_run, tmp_path, capsys
):
    check_mutations(evaluated_run, tmp_path, range(1000), capsys)
