"""Write the source code of Python's standard library, which is always available, as a JSON-lines corpus.

    megatron-adalrs collect-sources --output data/python.jsonl

Each file is one document, {"path": ..., "text": ...}, sorted by path. The result depends only on the version
of Python: files that the build or the distribution generates, empty files and files that are not UTF-8 are
skipped.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_adalrs.cli.program import parse_flags, reports_errors
from megatron_adalrs.preprocessing.python_sources import collect


@dataclass(frozen=True)
class Arguments:
    output: Path
    """The .jsonl file to write; an existing file is replaced."""
    limit_mb: float | None = None
    """Largest size of the sources, in megabytes (10^6 bytes). Default: no limit."""


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the corpus and print its size.

    Returns:
        0, or 2 if the corpus cannot be written.
    """
    flags = parse_flags(Arguments, __doc__, arguments)
    limit_bytes = float("inf") if flags.limit_mb is None else flags.limit_mb * 1e6
    root = Path(sysconfig.get_path("stdlib"))
    files, size = collect(root, flags.output, limit_bytes)
    print(f"{flags.output}: {files} files, {size} bytes of Python {sys.version.split()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
