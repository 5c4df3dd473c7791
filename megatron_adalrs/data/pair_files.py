"""Paths of the pair PREFIX.bin, PREFIX.idx, and the check that both files exist."""

from __future__ import annotations

import difflib
from pathlib import Path

from megatron_adalrs.config.data import DataConfig

_NEAR = 3
"""Number of similar prefixes, at most, that an error names."""


def bin_path(prefix: Path | str) -> Path:
    """Return the path of the tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    """Return the path of the index."""
    return Path(f"{prefix}.idx")


def require_pair(prefix: Path | str) -> None:
    """Require both files of a pair.

    Raises:
        FileNotFoundError: One is missing. The message names it, and similar pairs in the same folder.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise FileNotFoundError(
                f"indexed dataset {prefix}: there is no file {path} "
                "(required: the common prefix of a .bin/.idx pair, without the extension)"
                f"{_hint(Path(prefix))}"
            )


def require_pairs(data: DataConfig) -> None:
    """Require both files of every corpus.

    Raises:
        FileNotFoundError: As `require_pair` does; the message also names the field.
    """
    for field, corpora in data.corpora_by_field.items():
        for corpus in corpora:
            try:
                require_pair(corpus.prefix)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{field}: {error}") from None


def _hint(prefix: Path) -> str:
    """Return what the folder of a missing pair has instead."""
    where = "" if prefix.is_absolute() else f"; relative paths begin at {Path.cwd()}"
    present = [path for path in (idx_path(prefix), bin_path(prefix)) if path.is_file()]
    if present:
        return f"; {present[0]} exists"
    folder = prefix if prefix.is_dir() else prefix.parent
    if not folder.is_dir():
        return f"; there is no folder {folder}{where}"
    pairs = sorted(
        path.with_suffix("") for path in folder.glob("*.idx") if bin_path(path.with_suffix("")).is_file()
    )
    if not pairs:
        return f"; {folder} has no pairs{where}"
    return f"; {folder} has {', '.join(map(str, _nearest(prefix, pairs)))}{where}"


def _nearest(prefix: Path, pairs: list[Path]) -> list[Path]:
    """Return the pairs with the most similar names, or the first ones if none is similar."""
    by_name = {path.name: path for path in pairs}
    near = difflib.get_close_matches(prefix.name, by_name, n=_NEAR, cutoff=0.5)
    related = [name for name in by_name if name.startswith(prefix.name) or prefix.name.startswith(name)]
    names = list(dict.fromkeys([*near, *related])) or list(by_name)
    return [by_name[name] for name in names[:_NEAR]]
