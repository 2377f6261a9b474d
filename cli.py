"""`plain-lora train|evaluate|export|report`: the scripts of an installed package.

    pip install . && plain-lora train --demo

An installed package has one name, `plain_lora`, so that it replaces nobody's `evaluate` or `data`.
Only a process that this file starts finds the modules under the names that they have in a clone.
"""

import runpy
import shlex
import shutil
import sys
from pathlib import Path

SCRIPTS = {"train": "train", "evaluate": "evaluate", "export": "run.export", "report": "report"}
HELP = """usage: {name} COMMAND [options]

  train      fine-tune a base with LoRA: {name} train --demo
  evaluate   measure base and tuned model on the same problems, ask, or chat
  export     write an adapter merged, portable or as GGUF
  report     write the report of a run again

{name} COMMAND --help lists a command's options; {name} train --version names the version."""


def main() -> None:
    """Run the script that the first argument names, with the other arguments."""
    name = "plain-lora" if shutil.which("plain-lora") == sys.argv[0] else shlex.quote(sys.argv[0])
    if sys.argv[1:2] and sys.argv[1] in SCRIPTS:
        script = sys.argv.pop(1)
        sys.path.insert(0, str(Path(__file__).parent))
        sys.argv[0] = f"{name} {script}"  # what messages call this program
        runpy.run_module(SCRIPTS[script], run_name="__main__")
    elif sys.argv[1:] in (["-h"], ["--help"]):
        print(HELP.format(name=name))
    else:
        print(f"error: give one of {', '.join(SCRIPTS)}", file=sys.stderr)
        print(f"  {name} --help explains them", file=sys.stderr)
        sys.exit(2)
