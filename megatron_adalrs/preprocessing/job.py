"""Identity of a preprocessing job: everything that the bytes of the dataset depend on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_adalrs.data.tokenizer import Tokenizer
from megatron_adalrs.preprocessing.documents import Position, still_begins_with
from megatron_adalrs.preprocessing.encoding import Recipe

_VERSION = (
    1  # raise when the same job would give other bytes, or the files of unfinished work mean something else
)


@dataclass(frozen=True)
class Job:
    """Identity of a preprocessing job.

    Attributes:
        files: Size and modification time in nanoseconds of each input file, by relative path, in order.
    """

    version: int
    tokenizer_type: str
    tokenizer_sha256: str
    vocab_size: int
    eod: int
    append_eod: bool
    json_key: str
    input: str
    files: dict[str, tuple[int, int]]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(content: bytes) -> Job:
        """Parse the output of `to_json`. Raises ValueError, TypeError or KeyError for other content."""
        values = json.loads(content)
        files = {name: (int(size), int(changed)) for name, (size, changed) in dict(values["files"]).items()}
        return Job(**values | {"files": files})

    def differences(self, begun: Job, done: Position | None) -> str:
        """Return the differences that prevent resuming the job `begun`, or an empty string.

        Input after the position `done` may have changed.

        Args:
            begun: The unfinished job.
            done: Position of the last commit; None if all of the input is done.

        Raises:
            ValueError, OSError: If a partly read file has changed and cannot be read.
        """
        ours, theirs = asdict(self), asdict(begun)
        changed = [
            f"{name} was {theirs[name]!r}, is {ours[name]!r}"
            for name in ours
            if name != "files" and ours[name] != theirs[name]
        ]
        if begun.input == self.input:
            changed += self._differences_of_input(begun, done)
        return ", ".join(changed)

    def _differences_of_input(self, begun: Job, done: Position | None) -> list[str]:
        names = sorted(
            name for name in self.files | begun.files if self.files.get(name) != begun.files.get(name)
        )
        partly: list[str] = []
        if done is not None:
            order = list(begun.files)
            partly = order[done.file : done.file + 1] if done.lines else []
            last = max(order[: done.file] + partly, default="")
            names = [name for name in names if name <= last]
        if not names:
            return []
        told = _difference(names[0], begun.files.get(names[0]), self.files.get(names[0]))
        if done is not None and names == partly and names[0] in self.files:
            if still_begins_with(self._folder / names[0], done):
                return []
            told += f", and not only behind what is done, its first {done.lines} lines or rows"
        return [told, *([f"and so are {len(names) - 1} other files"] if names[1:] else [])]

    @property
    def _folder(self) -> Path:
        return _folder(Path(self.input))


def describe_job(tokenizer: Tokenizer, recipe: Recipe, source: Path, files: Sequence[Path]) -> Job:
    """Return the identity of a job. Raises OSError if an input file does not exist."""
    folder = _folder(source)
    states = {path.relative_to(folder).as_posix(): path.stat() for path in files}
    return Job(
        version=_VERSION,
        tokenizer_type=recipe.tokenizer_type,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=recipe.append_eod,
        json_key=recipe.json_key,
        input=str(source.absolute()),
        files={name: (state.st_size, state.st_mtime_ns) for name, state in states.items()},
    )


def _folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _difference(name: str, before: tuple[int, int] | None, now: tuple[int, int] | None) -> str:
    if before is None or now is None:
        return f"input file {name} is {'gone' if now is None else 'new'}"
    if before[0] != now[0]:
        return f"input file {name} had {before[0]} bytes, has {now[0]}"
    return f"input file {name} was written since then"
