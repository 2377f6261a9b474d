"""A page about a run, made from its folder and without torch: `python -m report out/...`."""

from report.sections import write_report

__all__ = ["write_report"]
