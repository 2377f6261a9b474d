"""The architecture: which file may import which, and what a function may look like.

From the bottom up: cellar (single files), ground floor (model, lora, data), halls (run,
evaluation), upper hall (report), roof (scripts). Imports run downward only.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
FLOORS = {
    "errors": 0, "files": 0, "hub": 0, "progress_bar": 0, "terminal": 0, "typed": 0,
    "model": 1, "lora": 1, "data": 1,
    "run": 2, "evaluation": 2,
    "report": 3,
    "train": 4, "evaluate": 4, "cli": 4,
}  # fmt: skip
SCRIPTS = {"train", "evaluate", "run.export", "report.__main__"}
MAX_PARAMETERS = 7
FOUND = [HOUSE / f"{place}.py" for place in FLOORS if (HOUSE / f"{place}.py").exists()]
FOUND += [path for place in FLOORS for path in sorted((HOUSE / place).rglob("*.py"))]
SOURCES = {  # module -> its syntax tree
    ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in FOUND
}


def imports(module: str) -> Iterator[tuple[str, str | None]]:
    """(imported module, imported name or None) of every import, also those inside functions."""
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, None) if inner in SOURCES else (node.module, alias.name)


def own_imports(module: str) -> set[str]:
    """The modules of the product that `module` imports."""
    return {name for name, _ in imports(module) if name in SOURCES}


def place(module: str) -> str:
    return module.partition(".")[0]


def crossings() -> set[tuple[str, str]]:
    """(importing place, imported place) wherever an import leaves its place."""
    pairs = {(place(module), place(name)) for module in SOURCES for name in own_imports(module)}
    return {(here, there) for here, there in pairs if here != there}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """(module.name, function) for every function and method of the product."""
    for module, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module}.{node.name}", node


def test_every_file_of_the_product_is_read_here():
    packages = {path.parent.name for path in HOUSE.glob("*/__init__.py")} - {"tests"}
    scripts = {path.stem for path in HOUSE.glob("*.py")}
    assert packages | scripts == FLOORS.keys()
    assert {"train", "lora.layer", "model", "report"} <= SOURCES.keys()


def test_no_module_imports_itself_through_others():
    TopologicalSorter({module: own_imports(module) for module in SOURCES}).prepare()  # CycleError


def test_imports_run_downward_only():
    cellar = {name for name, floor in FLOORS.items() if floor == 0}  # its files may use each other
    upward = {pair for pair in crossings() if FLOORS[pair[0]] <= FLOORS[pair[1]]}
    assert {pair for pair in upward if not set(pair) <= cellar} == set()


@pytest.mark.parametrize("neighbours", [("model", "lora", "data"), ("run", "evaluation")])
def test_neighbours_on_a_floor_know_nothing_of_each_other(neighbours):
    assert not {pair for pair in crossings() if set(pair) <= set(neighbours)}


def test_only_scripts_import_the_report_and_it_needs_no_torch():
    assert {here for here, there in crossings() if there == "report"} <= {"train", "evaluate"}
    reached, to_read = set(), [module for module in SOURCES if place(module) == "report"]
    while to_read:
        module = to_read.pop()
        reached.add(module)
        to_read += [name for name in with_packages(own_imports(module)) if name not in reached]
    libraries = {(module, place(name)) for module in reached for name, _ in imports(module)}
    assert {module for module, library in libraries if library == "torch"} == set()


def with_packages(modules: set[str]) -> set[str]:
    """`modules`, and the packages that Python imports with them."""
    return modules | {place(module) for module in modules if place(module) in SOURCES}


def test_scripts_do_not_import_scripts():
    assert {(script, name) for script in SCRIPTS for name in own_imports(script) & SCRIPTS} == set()


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def test_no_import_crosses_files_with_a_private_name():
    assert {
        (module, imported or name)
        for module in SOURCES
        for name, imported in imports(module)
        if is_private(imported or name)
    } == set()


def test_no_function_has_more_than_seven_parameters():
    too_many = []
    for where, function in functions():
        a = function.args
        parameters = (*a.posonlyargs, *a.args, *a.kwonlyargs)
        names = [p.arg for p in parameters if p.arg != "BLOCK"]  # a Triton kernel's constant
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        too_many += [(where, count)] if count > MAX_PARAMETERS else []
    assert too_many == []


def test_arbitrary_keywords_are_passed_on_to_tqdm_to_log_lines_and_by_jinja2_only():
    tunnels = {where for where, function in functions() if function.args.kwarg}
    assert tunnels == {
        "progress_bar.progress_bar", "hub.download_bar", "files.write", "run.track.write",
        "data.sandbox.call",
    }  # fmt: skip


def test_types_on_the_ground_floor_are_consistent():
    """As checked by mypy, with the settings in pyproject.toml."""
    pytest.importorskip("mypy", reason="mypy is installed with the extra `test`")
    check = [sys.executable, "-m", "mypy"]
    found = subprocess.run(check, cwd=HOUSE, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_map_in_the_readme_names_every_file_of_the_product_and_no_other():
    (drawn,) = re.findall(
        r"## The map\n.*?```\n(.*?)```", (HOUSE / "README.md").read_text(), re.DOTALL
    )
    folder, named = "", set()
    for line in filter(None, drawn.splitlines()):
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        else:
            named.add((folder if line.startswith(" ") else "") + name)
    product = {str(path.relative_to(HOUSE)) for path in FOUND if path.name != "__init__.py"}
    assert {name for name in named if name.endswith(".py")} == product
    assert all((HOUSE / name).exists() for name in named)


def test_tests_import_from_helpers_and_not_from_other_tests():
    wrong = []
    for path in (HOUSE / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            wrong += [
                (path.name, name) for name in names if re.match(r"tests(\.\w+)*\.test_", name)
            ]
    assert wrong == []
