"""Write the running Python's standard library, a corpus that every machine has, as one JSON-lines file.

    python tools/collect_sources.py --output data/python.jsonl

One document a file, {"path": ..., "text": ...}, sorted by path: the same for one version of Python wherever
it was installed whole. Files that an installation adds or generates, that are not UTF-8, or that are empty
are left out.
"""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_adalrs.preprocessing.python_sources import collect


@dataclass(frozen=True)
class Arguments:
    """Write the running Python's standard library sources as one JSON-lines corpus."""

    output: Path
    """The .jsonl file to write; an existing one is replaced."""
    limit_mb: float | None = None
    """Stop before the sources exceed so many megabytes (10^6 bytes); default: take all."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    limit_bytes = float("inf") if arguments.limit_mb is None else arguments.limit_mb * 1e6
    root = Path(sysconfig.get_path("stdlib"))
    try:
        files, size = collect(root, arguments.output, limit_bytes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {files} files, {size} bytes of Python {sys.version.split()[0]}")
    return 0
