"""Unfinished work on an indexed dataset, in a folder `PREFIX.partial` that survives the process.

    lock         locked by the process that works on it; contains its process id
    job.json     identity of the job: the same job is resumed, another one is refused
    tokens       tokens of all documents, appended
    lengths      tokens in each document, int32, appended
    state.json   progress, replaced atomically at every commit
    index, description   the other files of the dataset, once everything is tokenized

Bytes beyond the progress in state.json are ignored and truncated on resuming. Therefore a process may be
killed at any time, also during a commit or while publishing.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_adalrs.data.indexed_dataset_builder import write_index
from megatron_adalrs.preprocessing.documents import Position
from megatron_adalrs.preprocessing.encoding import Encoded
from megatron_adalrs.preprocessing.job import Job
from megatron_adalrs.utils.atomic_files import atomic_write

_T = TypeVar("_T")
_RESTART = "--restart throws the unfinished work away"
_FILES = ("lock", "job.json", "tokens", "lengths", "state.json", "index", "description")


@dataclass(frozen=True)
class Progress:
    """Progress of a job.

    Attributes:
        position: Position in the input up to which it is encoded.
        input_bytes: Bytes of the input up to there.
        documents: Documents encoded.
        skipped: Documents without text.
        tokens: Tokens encoded.
        complete: Whether only publishing remains.
    """

    position: Position = field(default_factory=Position)
    input_bytes: int = 0
    documents: int = 0
    skipped: int = 0
    tokens: int = 0
    complete: bool = False


class Partial:
    """The locked folder of unfinished work.

    As a context manager it commits when an exception leaves the block, if there are documents. A folder
    without any commit is removed at the end.

    Attributes:
        progress: Progress of the job, including that of earlier processes.

    Raises:
        ValueError: If another process works on the folder, it belongs to another job, it is damaged, or it
            contains other files.
        OSError: If it cannot be written.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype[Any], job: Job, *, restart: bool = False) -> None:
        self.folder = partial_path(prefix)
        self.dtype = dtype
        self._streams: dict[str, BinaryIO] = {}
        self._published = False
        self._lock = _locked(self.folder)
        try:
            if restart:
                self._clear()
            self.progress = self._committed = self._read(job)
            if self.progress == Progress():
                self._clear()
            with self._writing(), atomic_write(self.folder / "job.json") as stream:
                stream.write(job.to_json())
            if not self.progress.complete:
                for name, size in self._sizes().items():
                    self._streams[name] = self._grown(name, size)
        except BaseException:
            self._leave()
            raise
        self._commit_time = time.monotonic()

    def append(self, encoded: Encoded) -> None:
        """Append the next batch."""
        with self._writing():
            _write(self._streams["tokens"], encoded.tokens)
            _write(self._streams["lengths"], encoded.lengths)
        done = self.progress
        self.progress = Progress(  # this single assignment makes the batch part of the work
            position=encoded.end,
            input_bytes=done.input_bytes + encoded.input_bytes,
            documents=done.documents + len(encoded.lengths),
            skipped=done.skipped + encoded.skipped,
            tokens=done.tokens + len(encoded.tokens),
        )

    def commit_if_due(self, seconds: float) -> None:
        """Commit if the last commit is at least this many seconds ago."""
        if time.monotonic() - self._commit_time >= seconds:
            self.commit()

    def commit(self) -> None:
        """Commit the progress, from which the work can be resumed. Raises OSError if it cannot be written."""
        if self.progress == self._committed:
            return
        with self._writing():
            for name, size in self._sizes().items():
                self._streams[name].truncate(size)
                os.fsync(self._streams[name].fileno())
            with atomic_write(self.folder / "state.json") as stream:
                stream.write(json.dumps(asdict(self.progress)).encode())
        self._committed = self.progress
        self._commit_time = time.monotonic()

    def complete(self, description: bytes) -> None:
        """Write the index, with one sequence per document, and the description.

        Everything must be tokenized before.
        """
        self.commit()
        lengths = np.fromfile(self.folder / "lengths", "<i4")
        with self._writing():
            write_index(self.folder / "index", self.dtype, lengths, np.arange(len(lengths) + 1))
            with atomic_write(self.folder / "description") as stream:
                stream.write(description)
        self.progress = replace(self.progress, complete=True)
        self.commit()

    def publish(self, tokens: Path, index: Path, description: Path) -> None:
        """Rename the files of a complete dataset that are not renamed yet to their final names.

        An old index is removed before the new tokens appear, and the new index appears after them, so that no
        reader sees an inconsistent pair.
        """
        paths = {"tokens": tokens, "index": index, "description": description}
        left = {name: path for name, path in paths.items() if (self.folder / name).exists()}
        for name in ("description", "index"):
            if name in left:
                left[name].unlink(missing_ok=True)
        for name, path in left.items():
            os.replace(self.folder / name, path)
        self._published = True

    @property
    def has_tokens(self) -> bool:
        """Whether the tokens are not published yet."""
        return (self.folder / "tokens").exists()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"{self.folder} cannot be written: {reason}; once it can, run the same command again"
            ) from error

    def _sizes(self) -> dict[str, int]:
        """Return the valid size in bytes of each file that is appended to."""
        return {"tokens": self.progress.tokens * self.dtype.itemsize, "lengths": self.progress.documents * 4}

    def _read(self, job: Job) -> Progress:
        """Return the progress of earlier processes with this job."""
        if not (self.folder / "state.json").exists():
            return Progress()
        begun, progress = self._parsed("job.json", Job.from_json), self._parsed("state.json", _progress)
        if differences := job.differences(begun, None if progress.complete else progress.position):
            raise ValueError(
                f"{self.folder} contains unfinished work of another job: {differences}; {_RESTART}"
            )
        return progress

    def _parsed(self, name: str, parse: Callable[[bytes], _T]) -> _T:
        try:
            return parse((self.folder / name).read_bytes())
        except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
            raise self._damaged(f"{name}: {type(error).__name__}: {error}") from error

    def _grown(self, name: str, size: int) -> BinaryIO:
        """Open a file to append to, truncated to its valid size, without a buffer."""
        path = self.folder / name
        path.touch()
        stream = path.open("r+b", buffering=0)
        try:
            if (found := stream.seek(0, os.SEEK_END)) < size:
                raise self._damaged(f"{name} has {found} bytes: required at least {size}")
            stream.truncate(size)
            stream.seek(0)
            if name == "lengths" and (total := _sum(stream)) != self.progress.tokens:
                raise self._damaged(f"lengths adds up to {total} tokens: required {self.progress.tokens}")
            stream.seek(size)
        except BaseException:
            stream.close()
            raise
        return stream

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self.folder} is damaged: {reason}; {_RESTART}")

    def _clear(self) -> None:
        (self.folder / "state.json").unlink(missing_ok=True)  # first: without it the other files are ignored
        for path in self.folder.iterdir():
            if path.name != "lock" and _is_ours(path.name):
                path.unlink()

    def _leave(self) -> None:
        for stream in self._streams.values():
            stream.close()
        if self._published or not (self.folder / "state.json").exists():
            self._clear()
            (self.folder / "lock").unlink()  # last: the process that locks a new one has the folder to itself
            with suppress(OSError):
                self.folder.rmdir()
        self._lock.close()

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.progress.documents:  # without documents it would only block another job
            with suppress(OSError):  # the disk may be full: the last commit remains valid
                self.commit()
        self._leave()


def partial_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.partial")


def _locked(folder: Path) -> TextIO:
    """Lock the folder and return its lock file; closing it, also by a kill, releases the lock."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            with suppress(FileNotFoundError):
                if not stat.S_ISDIR(folder.lstat().st_mode):
                    raise
            continue  # its last owner removed it during mkdir
        try:
            _require_ours(folder)
            lock = (folder / "lock").open("a+")
        except FileNotFoundError:  # its last owner has just removed the folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read()
            lock.close()
            raise ValueError(f"{folder}: process {owner} is using it: required one at a time") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat()):
                lock.truncate(0)
                print(os.getpid(), end="", file=lock, flush=True)
                return lock
        lock.close()


def _require_ours(folder: Path) -> None:
    """Raise ValueError if the folder contains other files, except hidden ones."""
    others = sorted(
        path.name for path in folder.iterdir() if not (path.name.startswith(".") or _is_ours(path.name))
    )
    if others:
        raise ValueError(
            f"{folder} contains {others[0]}, which is not unfinished work: required another output prefix"
        )


def _is_ours(name: str) -> bool:
    return name in _FILES or (
        name.endswith(".tmp") and name.startswith(tuple(f".{file}." for file in _FILES))
    )


def _write(stream: BinaryIO, values: npt.NDArray[Any]) -> None:
    left = values.view(np.uint8).data
    while len(left):  # an unbuffered file may take only a part
        left = left[stream.write(left) :]


def _sum(stream: BinaryIO) -> int:
    total = 0
    while block := stream.read(1 << 22):
        total += int(np.frombuffer(block, "<i4").sum(dtype=np.int64))
    return total


def _progress(state: bytes) -> Progress:
    """Parse state.json. Raises ValueError, TypeError or KeyError for content that a commit never writes."""
    content = json.loads(state)
    progress = Progress(**content | {"position": Position(**content["position"])})
    counts = asdict(progress) | asdict(progress.position)
    del counts["position"]
    if type(counts.pop("complete")) is not bool or any(
        type(count) is not int or count < 0 for count in counts.values()
    ):
        raise ValueError(f"{content}: required counts")
    return progress
