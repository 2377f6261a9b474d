"""What the documents tell a reader to type exists, and what they quote is what the program says."""

import ast
import contextlib
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sizes
from evaluate import EvalConfig
from evaluation.summary import difference
from report.__main__ import ReportConfig
from run.export import ExportConfig
from run.options import known_flags
from train import TrainConfig

HOUSE = Path(__file__).parents[1]
PAGES = [HOUSE / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted(set((HOUSE / "docs").glob("*.md")) - {HOUSE / "docs" / "log.md"})  # it is history
TEXTS = {str(path.relative_to(HOUSE)): path.read_text("utf-8") for path in PAGES}
README, NEXT, TROUBLE = (TEXTS[n] for n in ("README.md", "docs/next.md", "docs/troubleshooting.md"))

# Each command in the README -> the test that runs it, or why none does.
TRAINED_FROM_HUB = (
    "tests/test_hub.py::"
    "test_a_run_fetches_its_base_and_data_once_and_then_trains_and_evaluates_offline"
)
DEMO = "tests/test_demo.py::test_a_shortened_demo_solves_what_its_base_cannot"
COMMANDS = {
    "python3 -m venv .venv": ".ci/run",
    ". .venv/bin/activate": "it changes only the shell in which it is typed",
    "pip install -c constraints.txt -e .": "a part of what .ci/run installs",
    "python train.py --epochs 3": TRAINED_FROM_HUB,
    "python evaluate.py --adapter out/qwen2-0.5b-instruct-gsm8k/best": TRAINED_FROM_HUB,
    "python train.py --demo": DEMO,
    "python evaluate.py --demo": DEMO,
    ".venv/bin/pip install -c constraints.txt -e '.[test]'": ".ci/run",
    ".venv/bin/python -m pytest": ".ci/run",
    "!pip install -q safetensors tokenizers huggingface-hub": "a test below compares the names",
    "!pip install -q pyarrow tqdm filelock": "a test below compares the names",
    "!python train.py --epochs 3": TRAINED_FROM_HUB,
}
FLAGS = {  # how a script is called in the documents -> its flags
    "train.py": known_flags(TrainConfig, ["demo"]),
    "evaluate.py": known_flags(EvalConfig, ["demo"]),
    "run.export": known_flags(ExportConfig),
    "python -m report": known_flags(ReportConfig),
}
SHOWN_AS_CHANGES = {"--label-smoothing"}  # by the tour's diffs
OF_OTHERS = {"--fix", "--options"}  # of other programs, quoted without these programs' names


def shell_lines(text: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.S)
            for line in block.splitlines()]  # fmt: skip


def code(text: str) -> list[str]:
    """Lines of code blocks, and code between backticks outside of them."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    indented = re.findall(r"^    (\S.*)", text, re.M)
    return [line for block in blocks for line in block.splitlines()] + spans + indented


def rows(text: str) -> list[list[str]]:
    """The cells of a page's first table, without its head."""
    lines = re.search(r"(^\|.*\n)+", text, re.M)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_every_command_in_the_readme_is_run_by_a_test_or_says_why_not():
    typed = [part.partition("#")[0].strip() for line in shell_lines(README)
             for part in line.split(" && ")]  # fmt: skip
    assert set(typed) == COMMANDS.keys()
    for reason in COMMANDS.values():
        file, is_test, name = reason.partition("::")
        assert not is_test or f"def {name}(" in (HOUSE / file).read_text("utf-8")


def test_continuous_integration_finds_exactly_one_test_command_in_the_readme():
    pattern = re.search(r"grep -E '(.*)' README.md", (HOUSE / ".ci" / "run").read_text("utf-8"))
    assert len(re.findall(pattern[1], README, re.M)) == 1


def test_the_commands_on_the_readmes_first_screen_fit_into_seventy_columns():
    first_screen = README.partition("\n## ")[0]
    assert max(map(len, shell_lines(first_screen))) <= 70


def test_the_notebook_installs_what_the_package_needs_except_the_pytorch_that_is_there():
    project = (HOUSE / "pyproject.toml").read_text("utf-8")
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", project, re.M | re.S)[1]
    needed = set(re.findall(r'"([\w-]+)', dependencies))
    lines = [line for line in shell_lines(README) if line.startswith("!pip install -q ")]
    installed = {name for line in lines for name in line.split()[3:]}
    assert installed == needed - {"torch", "numpy"}


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="a cell's output is a terminal of Unix")
def test_in_a_notebook_cell_the_notebooks_command_writes_whole_lines_and_bars_of_80_columns(
    tmp_path,
):
    import fcntl
    import termios

    (typed,) = [line for line in shell_lines(README) if line.startswith("!python ")]
    script, *_ = typed.removeprefix("!python ").split()
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # as IPython sets it
    flags = f"--demo --limit 60 --max-steps 4 --out {tmp_path / 'run'}".split()
    with subprocess.Popen([sys.executable, script, *flags], cwd=HOUSE, stdout=its, stderr=its):
        os.close(its)
        drawn = b""
        with contextlib.suppress(OSError):  # where Linux ends a terminal
            while part := os.read(ours, 4096):
                drawn += part
    os.close(ours)
    text = drawn.decode().replace(str(tmp_path), "").replace(str(HOUSE), "")
    assert "validate: " in text and "evaluate.py --adapter" in text
    assert "\x1b" not in text and max(map(len, re.split(r"[\r\n]+", text))) <= 80


@pytest.mark.parametrize("page", TEXTS)
def test_every_flag_that_a_page_names_exists(page):
    unknown = []
    for text in code(TEXTS[page]):
        script = next((name for name in FLAGS if f"{name} " in f"{text} "), None)
        if script:
            known = FLAGS[script]
            text = f"{text} ".partition(f"{script} ")[2]
        elif text.startswith("--"):
            known = {flag for flags in FLAGS.values() for flag in flags}
        else:
            continue  # of another program
        found = re.findall(r"(?<!\S)--[a-z][\w-]*", text)
        unknown += [flag for flag in found if flag not in {*known, *SHOWN_AS_CHANGES, *OF_OTHERS}]
    assert unknown == []


def messages() -> set[str]:
    """Every text in the product's source, with `...` for each value that is put into it."""
    found = set()
    for path in HOUSE.rglob("*.py"):
        if path.relative_to(HOUSE).parts[0] in ("tests", "benchmarks", ".venv", "out", "build"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts = [v.value if isinstance(v, ast.Constant) else "..." for v in node.values]
                found.add("".join(texts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"\{\w*\}", "...", node.value))  # a template for str.format
    return found


def test_the_messages_under_troubleshooting_are_the_programs_own():
    quoted = {cells[0].strip("`") for cells in rows(TROUBLE)}
    assert len(quoted) == 10
    assert quoted - messages() == set()


def test_every_line_under_what_next_names_its_test_or_the_documentation_that_it_is_from():
    for what, typed, shown_by in rows(NEXT):
        assert typed.count("`") >= 2, what
        files = re.findall(r"`(tests/\w+\.py)`", shown_by)
        assert files or "](https://" in shown_by, what
        assert all((HOUSE / file).exists() for file in files), what


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_within_the_project_leads_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (HOUSE / page).parent / file if file else HOUSE / page
        if not target.exists() or anchor and anchor not in anchors(target.read_text("utf-8")):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in TEXTS if page.startswith("docs/")])
def test_a_page_opens_with_a_title_and_what_it_answers(page):
    title, blank, opening, *_ = TEXTS[page].splitlines()
    assert title.startswith("# ") and not blank
    assert opening[0].isalpha()


def test_the_figures_of_the_real_run_are_those_of_its_result():
    result = json.loads((HOUSE / "docs/real-run/result.json").read_text("utf-8"))
    n, d = result["problems"], result["difference"]
    shares = {name: sum(m["outcomes"]) / n for name, m in result["models"].items()}
    loss, accuracy = ([m[key] for m in result["models"].values()]
                      for key in ("loss", "token_accuracy"))  # fmt: skip
    cell = " → ".join(f"{100 * shares[name]:.1f} %" for name in ("base", "tuned"))
    fell = f"the loss fell by {100 * (1 - loss[1] / loss[0]):.0f} %"
    rose = "rose from {:.0f} to {:.0f} %".format(*(100 * x for x in accuracy))
    assert cell in README and fell in README and rose in README
    page = (HOUSE / "docs/results.md").read_text("utf-8")
    changed = f"{d['fixed']} problems fixed, {d['broke']} broken"
    interval = f"between −{-d['low_points']:.1f} and +{d['high_points']:.1f}"
    assert changed in page and interval in page and f"All {n:,} test problems" in page


def test_the_figures_of_the_run_on_own_solutions_are_those_of_its_result():
    human, own = (json.loads((HOUSE / f"docs/real-run/{name}.json").read_text("utf-8"))
                  for name in ("result", "own"))  # fmt: skip
    outcomes = {name: m["outcomes"] for name, m in human["models"].items()}
    assert own["models"]["base"]["outcomes"] == outcomes["base"]
    three = {"base": outcomes["base"], "human": outcomes["tuned"],
             "own": own["models"]["tuned"]["outcomes"]}  # fmt: skip
    page = TEXTS["docs/results.md"].replace("**", "").replace("−", "-")
    shares = {k: f"{100 * sum(v) / len(v):.1f} %" for k, v in three.items()}
    assert f"{shares['base']} → {shares['own']}" in README
    for before, after in (("base", "own"), ("base", "human"), ("human", "own")):
        d = difference(three[before], three[after], seed=0)["difference"]
        points = "{difference_points:+.1f} ({low_points:+.1f} to {high_points:+.1f})".format(**d)
        assert f"| {d['fixed']} | {d['broke']} | {points} | {d['p_value']:.2f} |" in page


def test_the_memory_of_each_size_in_the_documents_is_the_estimate_of_the_program():
    table = sizes.table()
    assert table in TEXTS["docs/scaling.md"]
    gb = {name: re.search(rf"^\| Qwen2.5-{name} \| (.*) \|", table, re.M)[1].split(" | ")
          for name in ("0.5B", "7B")}  # fmt: skip
    said = f"{gb['0.5B'][0]} GB of a GPU's memory with 0.5B, and {gb['7B'][0]} GB with 7B, or"
    assert f"{said} {gb['7B'][-1]} GB" in README
