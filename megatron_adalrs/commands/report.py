"""Writes one self-contained HTML page about a training run, or about several drawn over each other.

python tools/report.py runs/a                               # runs/a/report.html
python tools/report.py runs/fixed runs/a --output both.html
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="folder that holds metrics.jsonl"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="default: report.html in the first RUN_DIR"
    )
    parser.add_argument("--title", help="title of the page; default: the names of the runs")
    options = parser.parse_args(arguments)

    from megatron_adalrs.report import write_report

    try:
        output = write_report(options.run_dirs, options.output, options.title)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    return 0
