"""Results of finished evaluations, as this or an earlier version wrote them. Without torch."""

from pathlib import Path
from typing import Any

from errors import BadData
from files import read_json


def read_result(path: Path) -> dict[str, Any]:
    """A `result.json` of this or an earlier version; raises BadData if it is anything else."""
    remedy = "give a result.json written by evaluate.py"
    result = upgrade_result(read_json(path, BadData, remedy))
    settings, models = result.get("settings"), result.get("models")
    if not isinstance(settings, dict) or "problems_sha256" not in settings or not models:
        raise BadData(f"{path} is not the result of an evaluation", remedy)
    return result


def upgrade_result(result: dict[str, Any]) -> dict[str, Any]:
    """A `result.json` with today's keys: `contestants` are now `models`, `right` is `correct`."""
    models = result.get("contestants")
    if not isinstance(models, dict):
        return result
    names = {"right": "correct"}
    models = {
        name: {names.get(k, k): v for k, v in m.items()} if isinstance(m, dict) else m
        for name, m in models.items()
    }
    return {k: v for k, v in result.items() if k != "contestants"} | {"models": models}
