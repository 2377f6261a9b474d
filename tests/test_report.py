"""Tests of the report: correct figures, inert text, and no exception for any damage."""

import json
import random
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest

from errors import BadRun, run_script
from report import figures, write_report
from report.__main__ import main
from report.figures import each_and_mean
from report.page import Table, fenced, inert, to_html, to_markdown
from report.records import RunRecord, Share, read_run
from report.sections import command, more_epochs, report_blocks
from run.folder import adapter_sha256
from run.options import parse, to_json
from train import TrainConfig

ROOT = Path(__file__).parents[1]
HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> ](javascript:alert(3)) [a](data:b)"
    "\n"
    "``` ````\n~~~\n# title\n| a | b |\n|---|---|\n`code` **bold** www.evil.example"
    " https://evil.example"
    " <https://evil.example> &lt;b&gt; \\` \ud800 \x00\x1b[31m $x^2$ </pre></details></style> "
    + "w" * 500
)  # fmt: skip
TAGS = set(
    "html head meta title style body h1 h2 h3 h4 p div dl dt dd table caption thead tbody tr th td"
    " pre b details summary nav a figure figcaption span svg line polyline circle text".split()
)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.texts.append(data)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def log_lines(steps: int = 200, every: int = 25) -> list[dict]:
    """A log whose train loss goes from 2 to 1 in the first half and stays there."""
    lines = []
    for step in range(1, steps + 1):
        loss = max(1.0, 2.0 - (step - 1) / (steps / 2))
        line = {"step": step, "epoch": step / 100, "train_loss": loss, "train_token_accuracy": 0.5}
        line |= {"learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_second": 1000.0}
        lines.append(line | {"train_token_accuracy": 0.5 if step < 100 else 0.9})
        if step % every == 0:
            val = {"val_loss": 2.0 - step / steps, "val_token_accuracy": 0.4 + 0.4 * step / steps}
            lines.append({"step": step, "epoch": step / 100, **val})
    return lines


def model_result(correct: int, text: str) -> dict:
    return {
        "correct": {"numeric-equal": correct, "strict-match": correct - 1}, "had_format": 30,
        "cut_off": 1, "empty": 0, "completions": 40, "tokens": 4000, "seconds": 50.0, "loss": 0.5,
        "token_accuracy": 0.8, "votes": {}, "pass": {},
        "mistakes": {"correct": correct, "format only": 2, text: 38 - correct},
        "by": {"reasoning steps": {"2": [correct, 30], "3": [0, 10]}, "operations": {text: [3, 9]}},
    }  # fmt: skip


def result(text: str) -> dict:
    """40 problems: base 10 right, tuned 14, with `text` wherever a file may hold text."""
    texts = {"id": text, "question": text, "gold": text, "base": text, "tuned": text}
    return {
        "settings": {"split": "test", "prompt": "chat", "data": text, "max_new_tokens": 512},
        "problems": 40,
        "models": {"base": model_result(10, text), "tuned": model_result(14, text)},
        "difference": {
            "n": 40, "fixed": 6, "broke": 2, "both_right": 8, "both_wrong": 24,
            "difference_points": 10.0, "p_value": 0.29, "low_points": -2.5, "high_points": 22.5,
            "confidence": 0.95,
        },
        "in_words": f"+10.0 points: not distinguishable {text}",
        "transcripts": {"fixed": [texts], "broken": [texts], "still wrong": [texts]},
        "examples": [texts, texts],
    }  # fmt: skip


def write_run(folder: Path, text: str = "What is 2 + 2?") -> Path:
    """A finished run of two hours with one evaluation, and `text` wherever a file holds text."""
    options = to_json(TrainConfig(model=text)) if text == HOSTILE else to_json(TrainConfig())
    identity = {"base_commit": "abc123", "data_commit": None, "precision": "bf16", "ranks": 1}
    config = {"options": options, "identity": identity, "versions": {"torch": text}, "device": text}
    progress = {
        "cursor": 200,
        "step": 200,
        "skipped": 0,
        "seconds": 7200.0,
        "stopped": "all 200 steps done",
    }
    audit = {
        "rows": {"train": 90, "validation": 10}, "left_out": [text], "tokens": {"total": 900},
        "supervised_count": 450, "duplicates": {"within train": {"exact": 3}},
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(folder / "audit.json", audit)
    write_json(
        folder / "checkpoints/step-000200/progress.json", {"progress": progress, "scaler": {}}
    )
    write_json(folder / "evaluation/test-1/settings.json", {})
    write_json(folder / "evaluation/test-1/result.json", result(text))
    lines = "\n".join(json.dumps(line) for line in log_lines())
    (folder / "metrics.jsonl").write_text(lines + "\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with its report, shared by tests that do not change it."""
    folder = write_run(tmp_path_factory.mktemp("out") / "tiny-sums")
    write_report(folder, price_per_hour=2.5)
    return folder


@pytest.fixture
def fresh_run(tmp_path):
    """A finished run that a test may change."""
    return write_run(tmp_path / "run")


def markdown(run: Path, price: float | None = None) -> str:
    return to_markdown(report_blocks(read_run(run, price)))


def run_with(folder: Path, **series: list[float]) -> RunRecord:
    """A run whose validations, from step 1 on, have these values."""
    lines = [dict(zip(series, values)) for values in zip(*series.values())]
    lines = [json.dumps({"step": step} | line) for step, line in enumerate(lines, start=1)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    write_json(folder / "config.json", {"options": {}})
    return read_run(folder)


def row(text: str, name: str) -> list[str]:
    """The other cells of the first row that begins with `name`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {inert(name)} |"))
    return [cell.strip() for cell in line.split(" | ")[1:]]


def python(code: str, *args: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_page_loads_and_runs_nothing(run):
    page = Page((run / "report.html").read_text())
    assert set(page.tags) <= TAGS
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    assert "default-src 'none'" in dict(page.attributes)["content"]
    assert "url(http" not in (run / "report.html").read_text()


def test_ids_on_the_page_are_unique_and_every_reference_has_one(run):
    text = (run / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', text)) <= {(i, "") for i in ids} | {
        ("", i) for i in ids
    }


def test_every_figure_has_a_title_a_unit_and_a_legend_if_it_has_two_series(run):
    figures = re.findall(r"<figure>.*?</figure>", (run / "report.html").read_text(), re.DOTALL)
    texts = [" ".join(Page(figure).text.split()) for figure in figures]
    wanted = {
        "Loss": ("nats per supervised token", "optimizer step", "each step", "mean of 5 steps",
                 "validation", "best, step 200"),
        "Token accuracy (teacher-forced)": ("share of supervised tokens", "train", "validation"),
        "Learning rate": ("per step", "optimizer step"),
        "Gradient norm": ("before clipping", "clipped at 1"),
        "Training speed": ("tokens per second", "each step", "mean of 5 steps"),
        "Answer accuracy (generated)": ("% of problems", "base", "tuned", "numeric-equal"),
        "Answer accuracy by reasoning steps": ("steps (problems)", "base", "tuned", "2 (30)"),
        "Kinds of mistakes": ("of 40 answers", "base", "tuned", "format only"),
    }  # fmt: skip
    assert len(texts) == len(wanted)
    for title, parts in wanted.items():
        text = next(t for t in texts if t.startswith(title))
        assert all(part in text for part in parts), (title, text)


def test_figures_take_every_color_from_the_theme(run):
    html = (run / "report.html").read_text()
    svgs, style = (
        "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL)),
        html.partition("</style>")[0],
    )
    assert svgs and not re.findall(r"#[0-9a-f]{3,6}|style=|fill=|stroke=", svgs)
    kinds = {kind for kinds in re.findall(r'class="([^"]*)"', svgs) for kind in kinds.split()}
    assert {"each", "mean", "validation", "best", "limit", "base", "tuned", "grid"} <= kinds
    assert all(f".{kind}" in style for kind in kinds)


def test_every_point_names_its_values_under_the_pointer(fresh_run):
    lines = [{"step": 1, "train_loss": 2.5}, {"step": 2, "train_loss": 1.25, "grad_norm": 3}]
    (fresh_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_report(fresh_run).read_text()
    circles = re.findall(r"<circle[^>]*><title>(.*?)</title>", html)
    assert {"step 1: 2.5", "step 2: 1.25", "step 2: 3"} <= set(circles)
    assert "numeric-equal, tuned: 35.0 % (22.1–50.5)" in circles


@pytest.mark.parametrize(
    ("values", "is_log"),
    [([1, 19], False), ([1, 20], True), ([0, 20], False), ([-1, 1000], False), ([0.1, 1e30], True),
     ([7], False), ([0], False), ([1e-300, 1e-299], False), ([-1e37, 1e37], False),
     ([1.0, 1.0 + 1e-12], False), ([0.0016, 4.09], True)],
)  # fmt: skip
def test_an_axis_is_logarithmic_by_its_range_and_has_ticks_on_it(values, is_log):
    axis = figures.Axis.of(values, 200, 10, log=True)
    assert axis.log == is_log
    assert 2 <= len(axis.ticks()) <= 12
    assert all(10 - 1e-6 <= axis(value) <= 200 + 1e-6 for value in [*values, *axis.ticks()])


@pytest.mark.parametrize("losses", [[], [0.5], [1e300, 2.0], [float("nan"), 2.0], [-1.0, 0.0]])
def test_any_losses_give_a_page(fresh_run, losses):
    lines = [{"step": i, "train_loss": x, "val_loss": x} for i, x in enumerate(losses)]
    (fresh_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawable = [x for x in losses if abs(x) < 1e38]
    assert write_report(fresh_run).read_text().count("optimizer step") == bool(drawable)


def test_the_contents_link_to_every_section_and_to_nothing_else(run):
    html = (run / "report.html").read_text()
    links = re.findall(r'<a href="#([^"]*)">([^<]*)</a>', html)
    assert links == re.findall(r'<h2 id="([^"]*)">([^<]*)</h2>', html) and len(links) == 8


def test_sections_without_content_are_left_out(tmp_path):
    write_json(tmp_path / "config.json", {"options": {}})
    html = write_report(tmp_path).read_text()
    assert "<h2" in html and "Answers in detail" not in html and "Options" not in html


def test_rows_and_columns_without_a_value_are_left_out():
    table = Table(("", "a", "b"), [("x", None, None), ("y", None, "1"), ("z", None, None)])
    assert table.markdown == "|  | b |\n|---|---|\n| y | 1 |"
    assert Page(table.html).texts == ["b", "\n", "y", "1"]
    assert Table(("", "a"), [("x", None)], "title").html == ""


def test_the_page_says_when_where_and_by_which_code_the_run_was_made(fresh_run):
    config = json.loads((fresh_run / "config.json").read_text())
    facts = {"started": "2026-11-25 09:23 UTC", "device": "a GPU", "program_git": "v1-g123"}
    write_json(fresh_run / "config.json", config | facts)
    assert "Started 2026-11-25 09:23 UTC. Machine: a GPU. Program: v1-g123." in markdown(fresh_run)


def test_peak_memory_is_that_of_the_largest_step(fresh_run):
    lines = [{"step": i, "peak_memory_gb": x} for i, x in enumerate((1.25, 7.5, 3.0))]
    (fresh_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert row(markdown(fresh_run), "Peak memory")[0] == "7.5 GB"


def test_options_that_differ_come_first_and_the_command_leaves_out_the_others(fresh_run):
    config = json.loads((fresh_run / "config.json").read_text())
    config["options"] |= {"epochs": 7, "dora": True}
    write_json(fresh_run / "config.json", config | {"changed_options": ["epochs", "dora"]})
    html, found = write_report(fresh_run).read_text(), read_run(fresh_run)
    before, _, folded = html.partition('id="options"')[2].partition("options at their defaults")
    assert "<dt>epochs</dt><dd>7</dd>" in before and "<dt>seed</dt>" not in before
    assert "<dt>seed</dt><dd>0</dd>" in folded
    assert command(found, found.repeated).replace(" \\\n    ", " ") == (
        "python train.py --dora --epochs 7 --revision abc123 --out run-again"
    )


def test_what_next_follows_from_the_state_of_the_run(fresh_run):
    def commands() -> str:
        return markdown(fresh_run).partition("## What next")[2].partition("\n## ")[0]

    assert "evaluate.py" in commands() and "measure base and tuned" not in commands()
    assert "twice the epochs" in commands() and "--epochs 6" in commands()  # its loss still falls
    (fresh_run / "evaluation/test-1/result.json").unlink()
    assert "measure base and tuned" in commands() and "finish the training" not in commands()
    (fresh_run / "checkpoints/step-000200/progress.json").unlink()
    assert "finish the training" in commands() and "twice the epochs" not in commands()


def test_each_source_has_a_column_of_validation_losses(fresh_run):
    by_source = {"gsm8k": 0.5, "a | b": 0.75}
    line = {"step": 5, "val_loss": 0.6, "val_loss_by_source": by_source}
    (fresh_run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert "| step | validation loss | loss, gsm8k | loss, a \\| b |  |" in markdown(fresh_run)
    assert "| 5 | 0.6000 | 0.5000 | 0.7500 | best |" in markdown(fresh_run)


def test_accuracy_is_never_mentioned_without_its_kind(run):
    for name in ("report.html", "report.md"):
        text = (run / name).read_text().lower()
        text = Page(text).text if name.endswith("html") else text.replace("\\", "")
        text = re.sub(
            r"\s+", " ", re.sub(r"token accuracy \(teacher-forced\)|answer accuracy", "", text)
        )
        assert "accuracy" not in re.sub(r"[\w.]+-accuracy|accuracy-\d|\.accuracy", "", text)


def test_first_and_last_values_match_the_worked_example(run):
    text = markdown(run)
    assert row(text, "train loss")[:3] == ["1.9950", "1.0000", "−49.87 % |"]  # means over two steps
    assert row(text, "validation loss, first and last")[2] == "−46.67 % |"  # 1.875 to 1
    assert row(text, "train loss over the last tenth of the steps")[2] == "+0.00 % |"
    assert row(text, "token accuracy (teacher-forced), train")[2] == "+40.00 points |"
    assert "It is not answer accuracy" in text


def test_accuracies_have_wilson_intervals_and_a_difference(run):
    cells = row(markdown(run), "numeric-equal")
    assert cells == ["25.0 % (14.2–40.2)", "35.0 % (22.1–50.5)", "+10.0 |"]


def test_a_point_gained_costs_the_training_time_divided_by_the_points(run):
    text = markdown(run, price=2.5)
    assert "12.0 min, $0.500; but the gain itself is not" in text.replace("\\", "")
    assert row(text, "training, including validation") == ["2 h 00 min", "\\$5.00 |"]
    assert "Price per hour: not given" in markdown(run)
    assert row(markdown(run), "training, including validation") == ["2 h 00 min |"]


@pytest.mark.parametrize("fixed", [2, 1])  # as many as broken, or fewer
def test_without_a_gain_a_point_has_no_cost(fresh_run, fixed):
    path = fresh_run / "evaluation/test-1/result.json"
    found = json.loads(path.read_text())
    found["difference"]["fixed"] = fixed
    write_json(path, found)
    assert "No points were gained" in markdown(fresh_run, price=2.5)


def test_a_dollar_in_a_label_is_a_dollar():
    shares = {"base": {"costs $\\frac$": Share.of(1, 2)}}
    assert "costs $\\frac$" in figures.shares("title", "unit", shares)


def test_the_command_repeats_every_option(tmp_path):
    argv = "--targets=q_proj,v_proj --rslora --data=-x --no-show-example --out".split()
    config = parse(TrainConfig, [*argv, "a b'$(c)"], "")
    identity = {"base_commit": "abc", "ranks": 2}
    write_json(tmp_path / "config.json", {"options": to_json(config), "identity": identity})
    run = read_run(tmp_path)
    words = shlex.split(command(run, run.repeated).replace("\\\n", ""))
    assert words[:4] == ["torchrun", "--nproc-per-node", "2", "train.py"]
    again = to_json(parse(TrainConfig, words[4:], ""))
    changed = {"revision": "abc", "out": "a b'$(c)-again", "rank": "8"}
    assert again == to_json(config) | changed


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], "Likely"),
        ([1.0, 0.6, 0.5, 0.5, 0.55, 0.6], "Unlikely"),
        ([1.0, 0.6, 0.5, 0.5001, 0.4999, 0.5, 0.5001, 0.4998], "Not much"),
        ([1.0, 0.5, 0.52, 0.48, 0.53, 0.47, 0.52, 0.48], "Not much"),  # falls, within its scatter
        ([1.0, 0.5, 0.5, 0.4999, 0.4998, 0.4997], "Not much"),  # falls, by under 0.5 % of the best
        ([1.0, 0.5, 0.4], "Unknown"),
        ([], "Unknown"),
    ],
)
def test_more_epochs_follow_the_rule(tmp_path, losses, verdict):
    assert more_epochs(run_with(tmp_path, val_loss=losses)).startswith(verdict)


def test_changes_of_a_tiny_loss_do_not_count(tmp_path):
    falling = [0.0023, 0.0022, 0.0019, 0.0016]
    assert more_epochs(run_with(tmp_path, val_loss=falling)).startswith("Not much")
    tenfold = [10 * loss for loss in falling]
    assert more_epochs(run_with(tmp_path, val_loss=tenfold)).startswith("Likely")


def test_more_epochs_follow_the_exact_match_where_it_was_measured(tmp_path):
    rising, flat = [1.0, 0.5, 0.6, 0.7, 0.8], [0.25, 0.25, 0.26, 0.25, 0.26]
    better = [0.1, 0.2, 0.3, 0.4, 0.5]
    found = more_epochs(run_with(tmp_path, val_loss=rising, val_exact_match=better))
    assert found.startswith("Likely: the share of wrong answers was still falling")
    found = more_epochs(run_with(tmp_path, val_loss=rising, val_exact_match=flat))
    assert found.startswith("Not much")


def test_the_loss_before_the_first_step_says_nothing_about_more_epochs(fresh_run):
    losses = {0: 99.0, 50: 1.0, 100: 1.0, 150: 1.0}  # the first would make it a falling line
    lines = [json.dumps({"step": step, "val_loss": loss}) for step, loss in losses.items()]
    (fresh_run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "needs 4 validations with a finite validation loss, and has 3" in markdown(fresh_run)


def test_the_best_validation_is_chosen_by_the_metric_of_early_stopping(fresh_run):
    config = json.loads((fresh_run / "config.json").read_text())
    rows = [
        {"step": s, "val_loss": v, "val_exact_match": e}
        for s, v, e in ((1, 2.0, 0.5), (2, 1.0, 0.25))
    ]
    (fresh_run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for stop_on, step in (("loss", 2), ("exact-match", 1)):
        config["options"]["stop_on"] = stop_on
        write_json(fresh_run / "config.json", config)
        assert read_run(fresh_run).best.step == step


def test_the_rank_and_alpha_of_earlier_versions_are_given_by_their_current_options(fresh_run):
    config = json.loads((fresh_run / "config.json").read_text())
    earlier = {"r": 8, "rank": "q_proj=16", "alpha": 16.0, "alphas": None}
    config["options"] = {"epochs": 2} | earlier | {"bias": "none", "init": "kaiming"}
    write_json(fresh_run / "config.json", config)
    found = read_run(fresh_run)
    assert found.options == {"epochs": 2, "rank": "8,q_proj=16", "alpha": "16"}
    repeated = command(found, found.repeated)
    assert "--rank 8,q_proj=16" in repeated and "--init" not in repeated
    assert "LoRA rank 8,q\\_proj=16" in markdown(fresh_run)


def test_results_and_audits_of_earlier_versions_give_the_same_report(fresh_run):
    now = markdown(fresh_run)
    renamed = {'"models": {': '"contestants": {', '"correct": {': '"right": {'}
    renamed |= {'"supervised_count":': '"supervised":'}
    for path in (fresh_run / "evaluation/test-1/result.json", fresh_run / "audit.json"):
        text = path.read_text()
        for current, earlier in renamed.items():
            text = text.replace(current, earlier)
        assert text != path.read_text()
        path.write_text(text)
    assert markdown(fresh_run) == now


def test_counts_that_exceed_the_problems_make_a_result_unreadable(fresh_run):
    path = fresh_run / "evaluation/test-1/result.json"
    write_json(path, json.loads(path.read_text()) | {"problems": 9})
    assert "answers so far: test-1 (none)" in markdown(fresh_run).replace("\\", "")


def test_hostile_text_is_only_text_in_html(tmp_path):
    page = Page(write_report(write_run(tmp_path / "run", HOSTILE)).read_text())
    assert set(page.tags) <= TAGS
    assert {n for n, _ in page.attributes} & {"src", "onerror"} == set()
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    assert page.text.count("<script>alert(1)</script>") >= 20  # unchanged, as text
    assert "\x00" not in page.text and "\x1b" not in page.text


def test_hostile_text_is_only_text_in_markdown(tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    text = markdown(write_run(tmp_path / "run", HOSTILE))
    reader = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
    page = Page(reader.render(text))
    allowed = "h1 h2 h3 h4 p strong table thead tbody tr th td pre code"
    assert set(page.tags) <= set(allowed.split())
    assert page.text.count("<script>alert(1)</script>") >= 20
    headings = re.findall(r"<h1>(.*?)</h1>", reader.render(text))
    assert headings == ["run"]  # "# title" in the text is not a heading
    for table in re.findall(r"<table>.*?</table>", reader.render(text), re.DOTALL):
        rows = re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
        assert len({len(re.findall("<t[hd]", cells)) for cells in rows}) == 1, table


def test_a_fence_is_longer_than_any_run_of_backticks_inside():
    assert fenced("a").startswith("```text\n") and fenced("a ```` b").startswith("`````text\n")


def test_bare_addresses_are_not_links_in_markdown():
    assert inert("https://a.b www.c.d") == "https:\\//a.b www\\.c.d"


@pytest.mark.parametrize(
    ("removed", "text"),
    [
        ("metrics.jsonl", "metrics.jsonl has no steps yet."),
        ("metrics.jsonl", "No validation has run yet."),
        ("audit.json", "This folder has no audit of the data"),
        ("checkpoints/step-000200/progress.json", "there is no checkpoint yet"),
        (
            "evaluation/test-1/result.json",
            "Unfinished evaluations, with answers so far: test-1 (none)",
        ),
        ("evaluation/test-1/result.json", "This folder has no finished evaluation."),
    ],
)
def test_the_report_says_what_is_missing(fresh_run, removed, text):
    (fresh_run / removed).unlink()
    write_report(fresh_run)
    assert text in (fresh_run / "report.md").read_text().replace("\\", "")


@pytest.mark.parametrize("name", ["run", "a b'`<i>", "\udce9t\udce9"])  # the last: a Latin-1 name
def test_a_run_that_has_only_begun_has_a_report(tmp_path, name):
    write_json(tmp_path / name / "config.json", {"options": {}})
    assert "not measured" in write_report(tmp_path / name).read_text()


def test_nulls_torn_lines_and_damaged_lines_are_skipped(fresh_run):
    rows = [{"step": 1, "train_loss": None, "grad_norm": True}, {"step": 1, "val_loss": None}]
    lines = [
        *map(json.dumps, rows),
        "\x00\x00",
        "[1]",
        '{"step": 2, "train_loss": NaN}',
        '{"step": 3, "tr',
    ]
    (fresh_run / "metrics.jsonl").write_text("\n".join(lines))
    found = read_run(fresh_run)
    assert (len(found.steps), len(found.validations), found.damaged_lines) == (2, 1, 2)
    assert found.best.step is None
    assert found.series("train_loss") == found.series("grad_norm") == []
    assert "2 lines of metrics.jsonl could not be read." in write_report(fresh_run).read_text()


def test_progress_comes_from_the_newest_readable_checkpoint(fresh_run):
    folder = fresh_run / "checkpoints"
    for name in ("step-3000000.new", "step-999999", "step-1000000", "step-x"):
        write_json(folder / name / "progress.json", {"progress": {"stopped": name}})
    (folder / "step-2000000").mkdir()
    assert read_run(fresh_run).progress.stopped == "step-1000000"


@pytest.mark.parametrize("depth", [30, 700, 100_000])
def test_deep_nesting_is_cut_off(fresh_run, depth):
    nested = "[" * depth + "]" * depth
    path = fresh_run / "evaluation/test-1/result.json"
    path.write_text(path.read_text().replace('"test"', nested, 1))
    (fresh_run / "audit.json").write_text('{"rows": ' + nested + "}")
    (fresh_run / "metrics.jsonl").write_text('{"step": 1, "train_loss": ' + nested + "}\n")
    assert "Training" in markdown(fresh_run)


def damaged(value: object, rng: random.Random) -> object:
    """`value` with about one part in eight missing or of another type."""
    if rng.random() < 0.12:
        other = [
            None,
            True,
            -1,
            0,
            10**400,
            float("nan"),
            1e300,
            "",
            HOSTILE,
            [],
            {},
            [[1]],
            {"a": []},
        ]
        return rng.choice(other)
    if isinstance(value, dict):
        return {k: damaged(v, rng) for k, v in value.items() if rng.random() > 0.05}
    if isinstance(value, list):
        return [damaged(v, rng) for v in value]
    return value


@pytest.mark.parametrize("seed", range(60))
def test_no_damage_raises_an_exception(tmp_path, seed):
    folder, rng = write_run(tmp_path / "run"), random.Random(seed)
    for path in sorted(folder.rglob("*.json")):
        if path.name != "config.json":
            write_json(path, damaged(json.loads(path.read_text()), rng))
    config = json.loads((folder / "config.json").read_text())
    options = {k: damaged(v, rng) for k, v in config.pop("options").items()}
    others = {k: damaged(v, rng) for k, v in config.items()}
    write_json(folder / "config.json", others | {"options": options})
    lines = [json.dumps(damaged(line, rng)) for line in log_lines(60, every=10)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    blocks = report_blocks(read_run(folder, 2.5))
    (to_html("a", blocks) + to_markdown(blocks)).encode()


def test_a_folder_that_is_not_a_run_is_refused_with_exit_code_2(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model/config.json", {"architectures": ["Qwen2ForCausalLM"]})
    for folder in (tmp_path, tmp_path / "model", tmp_path / "none", tmp_path / "model/config.json"):
        assert run_script(lambda folder=folder: main([str(folder)])) == 2
        assert "is not a run folder" in capsys.readouterr().err
        assert not (folder / "report.html").exists()


def test_a_report_that_cannot_be_written_is_a_user_error(fresh_run):
    (fresh_run / "report.md").mkdir()
    with pytest.raises(BadRun, match="cannot be written"):
        write_report(fresh_run)


def test_a_negative_price_or_no_folder_is_refused(run):
    assert run_script(lambda: main([str(run), "--price-per-hour", "-1"])) == 2
    assert run_script(lambda: main([])) == 2


def test_neither_torch_nor_matplotlib_is_imported(fresh_run):
    code = (
        "import sys; from report.__main__ import main; main([sys.argv[1]]);"
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    )
    done = python(code, fresh_run)
    assert done.returncode == 0, done.stderr


def test_the_same_folder_gives_the_same_report(fresh_run):
    texts = [write_report(fresh_run).read_text() + markdown(fresh_run) for _ in range(2)]
    assert texts[0] == texts[1]


def test_the_vote_of_all_samples_is_the_headline(fresh_run):
    path = fresh_run / "evaluation/test-1/result.json"
    found = json.loads(path.read_text())
    for name, correct in (("base", 12), ("tuned", 20)):
        found["models"][name]["votes"] = {"maj@1": 1, "maj@8": correct}
    write_json(path, found)
    assert (
        row(markdown(fresh_run), "Answer accuracy (generated), What is 2 + 2?, test, chat")[0]
        == "30.0 → 50.0 %"
    )
    assert "majority of all samples" in markdown(fresh_run)


def test_only_evaluations_of_the_adapter_in_best_are_shown(fresh_run):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (fresh_run / "best").mkdir(exist_ok=True)
        (fresh_run / "best" / name).write_text(name)
    for name, correct, sha256 in (
        ("new", 20, adapter_sha256(fresh_run / "best")), ("old", 30, "0" * 64)
    ):  # fmt: skip
        found = result("Sums")
        found["settings"] |= {"adapter_sha256": sha256}
        found["models"]["tuned"]["correct"]["numeric-equal"] = correct
        write_json(fresh_run / f"evaluation/{name}/result.json", found)
    (fresh_run / "evaluation/test-1/result.json").unlink()
    text = markdown(fresh_run)
    assert row(text, "Answer accuracy (generated), Sums, test, chat")[0] == "25.0 → 50.0 %"
    assert (
        "→ 75.0" not in text and "Not shown, because best/ holds another adapter now: old." in text
    )
    (fresh_run / "best/adapter_model.safetensors").write_text("a later one")
    assert "not measured" in markdown(fresh_run) and "now: new, old." in markdown(fresh_run)


def test_among_equal_exact_matches_the_lower_loss_is_best_as_in_training(tmp_path):
    options = {"options": {"stop_on": "exact-match"}}
    write_json(tmp_path / "config.json", options)
    lines = [{"step": s, "val_loss": v, "val_exact_match": 0.5} for s, v in ((1, 0.9), (2, 0.8))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(tmp_path).best.step == 2


def test_the_mean_curve_holds_the_mean_of_as_many_steps_on_both_sides():
    points = [(step, float(step**2)) for step in range(200)]
    _, mean = each_and_mean(points)
    assert mean.label == "mean of 5 steps" and len(mean.points) > 50
    for step, value in mean.points:
        assert value == fmean(v for at, v in points if abs(at - step) <= 2)
