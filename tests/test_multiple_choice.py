"""Laws of tasks with choices; the truth is lm-evaluation-harness's own code, or a plain loop."""
