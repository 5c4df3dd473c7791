"""Lines of text that fit a console of 80 columns, with the time of day where they go to a file."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from typing import IO

WIDTH = 80
INDENT = "    "


def time_stamp(file: IO[str]) -> str:
    """Return the time of day to put before a line, and nothing on a terminal."""
    return "" if file.isatty() else time.strftime("%H:%M:%S ")


def wrap(text: str, stamp: str = "") -> str:
    """Break the lines of a text between words, with a time stamp before each of them.

    A path that is longer than a line stands on a line of its own. A row of a table, whose cells are apart by
    more than one space, is not broken.
    """
    lines: list[str] = []
    for line in text.splitlines():
        if "  " in line.strip():
            lines.append(stamp + line)
            continue
        lines += textwrap.wrap(
            line,
            WIDTH,
            initial_indent=stamp,
            subsequent_indent=" " * len(stamp) + INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [stamp.rstrip()]
    return "\n".join(lines)


def fill(fields: Sequence[str], stamp: str = "") -> str:
    """Join the fields of a line, and break it only between fields."""
    lines = [stamp + fields[0]]
    for field in fields[1:]:
        longer = f"{lines[-1]} | {field}"
        if len(longer) <= WIDTH:
            lines[-1] = longer
        else:
            lines.append(" " * len(stamp) + INDENT + field)
    return "\n".join(lines)
