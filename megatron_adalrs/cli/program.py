"""Shared parts of the commands: parsing, error messages, exit codes and the flags of a tokenizer."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from megatron_adalrs.cli.aliases import rename_tokenizer
from megatron_adalrs.config.data import TokenizerKind

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

    Args:
        kind: The dataclass; the docstrings of its fields are the help texts.
        description: Text of `--help` above the flags.
        arguments: Command line without the program's name. Default: that of the process.

    Raises:
        SystemExit: After `--help` (0), or if the flags cannot be parsed (2, with the message printed).
    """
    prog = os.path.basename(sys.argv[0])
    given = rename_tokenizer(sys.argv[1:] if arguments is None else arguments)
    return tyro.cli(kind, prog=prog, description=description, args=given)


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
