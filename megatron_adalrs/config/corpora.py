"""Parser of the corpora in `--data-path` and similar flags, a single prefix or a blend of several."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from megatron_adalrs.config.base import require

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


def _as_entries(value: Any) -> Any:
    """Convert a prefix, or a list of prefixes and numbers from YAML, to the strings of a command line."""
    words = [value] if isinstance(value, (str, Path)) else value
    if not isinstance(words, (list, tuple)):
        return value
    return tuple(
        str(word) if isinstance(word, (str, int, float, Path)) and not isinstance(word, bool) else word
        for word in words
    )


Entries = Annotated[tuple[str, ...], BeforeValidator(_as_entries)]


@dataclass(frozen=True)
class Corpus:
    """A preprocessed corpus, `prefix`.bin and `prefix`.idx, in a blend."""

    name: str
    """Name in metrics."""
    prefix: str
    size: float
    """Size in the unit of `blend_sizes`, finite and not negative."""


def change_prefixes(entries: Sequence[str], change: Callable[[str], str]) -> tuple[str, ...]:
    """Return the entries with `change` applied to each prefix; sizes and names stay as they are."""
    changed = []
    entries = _split_pairs(entries)
    for entry in entries:
        given = _NAMED.fullmatch(entry)
        name, prefix = (f"{given[1]}=", given[2]) if given else ("", entry)
        is_size = len(entries) > 1 and _number(entry) is not None
        changed.append(entry if is_size else name + change(prefix))
    return tuple(changed)


def parse_corpora(field: str, entries: Sequence[str], needs_sizes: bool) -> tuple[Corpus, ...]:
    """Parse the corpora of a flag.

    The entries are one PREFIX, SIZE PREFIX pairs or, unless `needs_sizes`, several PREFIX of equal size.
    NAME=PREFIX names a corpus; without a name, the last part of its path is used. A prefix may have the
    extension of one of its files, and pairs may stand in one string.

    Raises:
        ValueError: If the entries have another form. The message names the field, the entry and the
            requirement.
    """
    require(len(entries) > 0, f"{field}: names no corpus: required the prefix of a .bin/.idx pair")
    entries = _split_pairs(entries)
    has_sizes = len(entries) > 1 and (needs_sizes or _number(entries[0]) is not None)
    if has_sizes:
        require(
            len(entries) % 2 == 0,
            f"{field}: {len(entries)} entries ({' '.join(entries)}): required one prefix, or as many numbers "
            "as prefixes: SIZE PREFIX SIZE PREFIX",
        )
        sizes = [_size(field, size, prefix) for size, prefix in zip(entries[::2], entries[1::2], strict=True)]
        require(sum(sizes) > 0, f"{field}: all sizes are 0: required at least one above")
        entries = entries[1::2]
    else:
        sizes = [1.0] * len(entries)
        for entry in entries if len(entries) > 1 else ():
            require(
                _number(entry) is None,
                f"{field}: {entry!r} stands among prefixes without sizes: required SIZE PREFIX SIZE PREFIX",
            )
    named = [_named(entry) for entry in entries]
    for what, values in (("called", [name for name, _ in named]), ("at", [prefix for _, prefix in named])):
        value, count = Counter(values).most_common(1)[0]
        require(
            count == 1,
            f"{field}: {count} corpora are {what} {value!r}: required different corpora with different "
            "names, NAME=PREFIX gives one",
        )
    return tuple(Corpus(name, prefix, size) for (name, prefix), size in zip(named, sizes, strict=True))


def _split_pairs(entries: Sequence[str]) -> Sequence[str]:
    """Split "SIZE PREFIX SIZE PREFIX" in one string; any other string may be a path with spaces."""
    words = entries[0].split() if len(entries) == 1 else []
    is_blend = len(words) >= 4 and all(_number(word) is not None for word in words[::2])
    return words if is_blend else entries


def _named(entry: str) -> tuple[str, str]:
    given = _NAMED.fullmatch(entry)
    prefix = given[2] if given else entry
    for extension in (".bin", ".idx"):
        if Path(prefix).suffix == extension:
            prefix = prefix.removesuffix(extension)
    return (given[1] if given else Path(prefix).name or prefix, prefix)


def _size(field: str, entry: str, prefix: str) -> float:
    size = _number(entry)
    if size is None:
        raise ValueError(
            f"{field}: {entry!r} before {prefix} is not a number: required SIZE PREFIX SIZE PREFIX"
        )
    require(
        math.isfinite(size) and size >= 0,
        f"{field}: size {entry} of {prefix}: required a finite number that is not negative",
    )
    return size


def _number(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None
