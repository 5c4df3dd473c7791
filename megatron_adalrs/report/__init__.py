"""One self-contained HTML page about one run, or about several drawn over each other."""

from megatron_adalrs.report.page import write_report

__all__ = ["write_report"]
