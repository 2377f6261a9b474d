"""Results of finished evaluations, as this or an earlier version wrote them. Without torch."""

from pathlib import Path
from typing import Any

from errors import BadData
from files import read_json
from typed import fault

METRICS = {  # of a model
    "correct": dict[str, int], "outcomes": list[bool], "votes": dict[str, int],
    "pass": dict[str, float], "pass_intervals": dict[str, list[float]], "by": dict[str, dict],
    "mistakes": dict[str, int],
    **dict.fromkeys(("had_format", "cut_off", "empty", "completions", "tokens"), int),
    **dict.fromkeys(("seconds", "right_choice_nats"), float),
    **dict.fromkeys(("loss", "token_accuracy"), float | None),
}  # fmt: skip


def read_result(path: Path) -> dict[str, Any]:
    """A `result.json` of this or an earlier version; raises BadData if it is anything else."""
    remedy = "give a result.json written by evaluate.py"
    result = upgrade_result(read_json(path, BadData, remedy))
    settings, models = result.get("settings"), result.get("models")
    if not isinstance(settings, dict) or "problems_sha256" not in settings or not models:
        raise BadData(f"{path} is not the result of an evaluation", remedy)
    if wrong := _fault(result):
        raise BadData(f"{path}: {wrong}", remedy)
    return result


def _fault(result: dict[str, Any]) -> str | None:
    """What is wrong with the first value that is not of the type it must have."""
    problems = result.get("problems")
    wrong = fault({"problems": None} | result, {"problems": int, "models": dict[str, dict]})
    for name, metrics in () if wrong else result["models"].items():
        if inner := fault({"correct": None, "outcomes": None} | metrics, METRICS):
            return f"models.{name}.{inner}"
        counts = [*metrics["correct"].values(), *metrics.get("votes", {}).values()]
        if len(metrics["outcomes"]) != problems or any(not 0 <= n <= problems for n in counts):
            return f"models.{name} is not of {problems} problems"
        if metrics.get("completions", 1) < 1:
            return f"models.{name}.completions is {metrics['completions']}, not above 0"
    return wrong


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
