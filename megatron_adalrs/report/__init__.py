"""Reports: one self-contained HTML page about a run, or about several runs in comparison."""

from megatron_adalrs.report.page import write_report

__all__ = ["write_report"]
