"""`plain-lora train|evaluate|export|report`: the scripts of an installed package.

    pip install . && plain-lora train --demo

An installed package has one name, `plain_lora`, so that it replaces nobody's `evaluate` or `data`.
Only a process that this file starts finds the modules under the names that they have in a clone.
"""

import runpy
import sys
from pathlib import Path

SCRIPTS = {"train": "train", "evaluate": "evaluate", "export": "run.export", "report": "report"}


def main() -> None:
    """Run the script that the first argument names, with the other arguments."""
    if sys.argv[1:2] and sys.argv[1] in SCRIPTS:
        sys.path.insert(0, str(Path(__file__).parent))
        runpy.run_module(SCRIPTS[sys.argv.pop(1)], run_name="__main__", alter_sys=True)
    else:
        print(f"error: give one of {', '.join(SCRIPTS)}", file=sys.stderr)
        print("  such as plain-lora train --demo", file=sys.stderr)
        sys.exit(2)
