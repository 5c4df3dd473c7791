"""Shared parts of the commands: parsing, error messages, exit codes and the flags of a tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from megatron_adalrs.cli.aliases import rename_tokenizer
from megatron_adalrs.config.data import TokenizerKind
from megatron_adalrs.utils.paths import expand_path

PROGRAM = "megatron-adalrs"
USAGE_ERROR = 2
"""Exit code for a mistake of the user's: a wrong flag, or a file that cannot be read."""
BROKEN_PIPE = 141
"""Exit code if standard output is a pipe that its reader closed, as a shell reports SIGPIPE."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""

Main = Callable[[Sequence[str] | None], int]
Flags = TypeVar("Flags")


def parse_flags(kind: type[Flags], description: str | None, arguments: Sequence[str] | None = None) -> Flags:
    """Parse a command line into a dataclass whose fields are the flags.

    `~` and `$NAME` in paths are expanded.

    Args:
        kind: The dataclass; the docstrings of its fields are the help texts.
        description: Text of `--help` above the flags.
        arguments: Command line without the program's name. Default: that of the process.

    Raises:
        ValueError: A path names an environment variable or user that is not known.
        SystemExit: After `--help` (0), or if the flags cannot be parsed (2, with the message printed).
    """
    prog = os.path.basename(sys.argv[0])
    given = rename_tokenizer(sys.argv[1:] if arguments is None else arguments)
    flags: Flags = _with_paths(tyro.cli(kind, prog=prog, description=description, args=given))
    return flags


def _with_paths(flags: Any, name: str = "") -> Any:
    """Return a value of a flag, or a dataclass or sequence of such values, with its paths expanded."""
    if isinstance(flags, Path):
        try:
            return Path(expand_path(str(flags)))
        except ValueError as error:
            raise ValueError(f"--{name.replace('_', '-')}: {flags}: {error}") from None
    if isinstance(flags, (tuple, list)):
        return type(flags)(_with_paths(value, name) for value in flags)
    if not dataclasses.is_dataclass(flags) or isinstance(flags, type):
        return flags
    names = [field.name for field in dataclasses.fields(flags)]
    return dataclasses.replace(flags, **{name: _with_paths(getattr(flags, name), name) for name in names})


def reports_errors(main: Main) -> Callable[..., int]:
    """Decorate a command's `main`: print a ValueError or OSError as one line and return exit code 2."""

    @functools.wraps(main)
    def wrapped(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return USAGE_ERROR

    return wrapped


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """Flags that name a tokenizer's files."""

    tokenizer_model: Path | None = None
    """The .model file of SentencePiece, or the tokenizer.json (or its folder) of Hugging Face."""
    vocab_file: Path | None = None
    """vocab.json of a GPT2BPETokenizer."""
    merge_file: Path | None = None
    """merges.txt of a GPT2BPETokenizer."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFlags(TokenizerFiles):
    """Flags that choose a tokenizer, all optional."""

    tokenizer_type: TokenizerKind | None = None
    """Kind of tokenizer. Default: the tokenizer stored with the model, if there is a model."""
