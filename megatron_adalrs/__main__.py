"""The `megatron-adalrs` program: `megatron-adalrs COMMAND [flags]`, or `python -m megatron_adalrs`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from megatron_adalrs import __version__
from megatron_adalrs.cli.program import BROKEN_PIPE, PROGRAM, USAGE_ERROR
from megatron_adalrs.commands import COMMANDS


def main() -> int:
    """Run the command named by the first argument, and end quietly if the reader of its output is gone.

    Returns:
        The exit code of the command; 2 if there is no such command; 141 if the output is a closed pipe.
    """
    try:
        exit_code = run_command()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return exit_code


def run_command() -> int:
    """Import and run the command that the command line names, and return its exit code."""
    if len(sys.argv) < 2:
        print(usage(), file=sys.stderr)
        return USAGE_ERROR
    name, *arguments = sys.argv[1:]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        suggestion = f"did you mean {near[0]}?" if near else f"{PROGRAM} --help lists the commands"
        print(f"error: {name}: no such command; {suggestion}", file=sys.stderr)
        return USAGE_ERROR
    sys.argv = [f"{PROGRAM} {name}", *arguments]  # the name in usage lines and messages
    command = COMMANDS[name]
    module = importlib.import_module(f"megatron_adalrs.commands.{command.module}")
    exit_code: int = getattr(module, command.function)()
    return exit_code


def usage() -> str:
    """Return the program's help text, a line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [flags]",
            "",
            "GPT pretraining on DeepSpeed with the AdaLRS learning-rate search.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help describes a command's flags; {PROGRAM} --version prints the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
