"""train.py whose second rank dies in its third step: python -m tests.dying_rank HOW FLAGS."""

import os
import signal
import sys

import train
from errors import TrainingFailed, run_script

how, *flags = sys.argv[1:]
calls, plain = 0, train.forward_backward


def dying(*args, **options):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 3:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise TrainingFailed("the root cause", "its remedy")
    return plain(*args, **options)


train.forward_backward = dying
sys.exit(run_script(lambda: train.main(flags)))
