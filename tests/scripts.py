"""The scripts of the product, each in a process of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

from run.identity import PACKAGES

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, flags: list, *, before: str = "", **options) -> subprocess.CompletedProcess:
    """Run `name.py` in a process of its own, after the code `before`."""
    code = f"{before}\nimport sys, runpy\nsys.argv = {[name, *map(str, flags)]!r}\n"
    code += f"runpy.run_path({str(ROOT / name)!r}, run_name='__main__')"
    options = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 300, **options}
    return subprocess.run([sys.executable, "-c", code], **options)


def copy_product(folder: Path) -> None:
    """Copy the code to a new folder; a virtual environment in the clone would take minutes."""
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
