"""Expansion of `~` and environment variables in the paths that users give."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))", re.ASCII)


def expand_path(path: str) -> str:
    """Return a path with `~`, `~user`, `$NAME` and `${NAME}` replaced, as a shell does.

    Raises:
        ValueError: A variable or user is not known.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] if found[1] is not None else found[2]
        if not os.environ.get(name):
            raise ValueError(f"the environment variable {name or '(without a name)'} is not set")
        return os.environ[name]

    home = os.path.expanduser(path)
    if path.startswith("~") and home == path:
        raise ValueError(f"{path.split('/')[0]} is not the home of a known user (write ./~ for that name)")
    return _VARIABLE.sub(value, home)
