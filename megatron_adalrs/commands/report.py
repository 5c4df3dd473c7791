"""Write a self-contained HTML report on a training run, or on several runs in the same plots.

megatron-adalrs report runs/a                               # writes runs/a/report.html
megatron-adalrs report runs/fixed runs/a --output both.html
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_adalrs.cli.program import parse_flags, reports_errors


@dataclass(frozen=True)
class Arguments:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, each with a metrics.jsonl."""
    output: Path | None = None
    """HTML file to write. Default: report.html in the first run directory."""
    title: str | None = None
    """Title of the page. Default: the names of the runs."""


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print its path and size.

    Returns:
        0, or 2 if a run cannot be read or the report cannot be written.
    """
    flags = parse_flags(Arguments, __doc__, arguments)
    if not flags.run_dirs:
        raise ValueError("RUN_DIR: is required, give at least one run directory")
    from megatron_adalrs.report import write_report

    output = write_report(flags.run_dirs, flags.output, flags.title)
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
