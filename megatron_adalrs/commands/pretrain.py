"""Pretrain a GPT on one or more ranks.

Commands to start it:

    deepspeed pretrain_gpt.py --config FILE.yaml [flags]
    deepspeed --module megatron_adalrs.commands.pretrain --config FILE.yaml [flags]
    megatron-adalrs pretrain --config FILE.yaml [flags]  # one rank
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from megatron_adalrs.cli.arguments import parse_arguments
from megatron_adalrs.cli.program import BROKEN_PIPE, USAGE_ERROR
from megatron_adalrs.distributed.launcher import adopt_launch_environment
from megatron_adalrs.metrics.console_text import wrap

if TYPE_CHECKING:
    from megatron_adalrs.config import Config

RANKS_DIFFER = 3
"""Exit code after --check-ranks-every found ranks that disagree."""
FIRST_RANK_SECONDS = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Pretrain, or print the plan of --dry-run.

    Args:
        arguments: Command line without the program's name. Default: that of the process.

    Returns:
        0 if the run is complete; 2 if the configuration is not valid; 3 if --check-ranks-every found that
        ranks disagree; 4 if another rank was lost; 5 if --loss-guard.policy stopped the run; 141 if the
        output of --help or --dry-run is a closed pipe; 143 if the run was interrupted and saved.
    """
    try:
        adopt_launch_environment()
    except ValueError as error:
        return refuse(error, is_first_rank=True)
    is_first_rank = os.environ.get("RANK", "0") == "0"
    try:
        config = parse_arguments(sys.argv[1:] if arguments is None else arguments, print_errors=is_first_rank)
        if config.run.dry_run:
            if is_first_rank:
                print_plan(config)
            return 0
    except BrokenPipeError:
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        return refuse(error, is_first_rank)
    except SystemExit as ended:  # --help or a flag that cannot be parsed; the message is already printed
        if ended.code:
            wait_for_first_rank(is_first_rank)
        raise
    return pretrain(config, is_first_rank)


def print_plan(config: Config) -> None:
    """Print the mesh and memory of the run that --dry-run asks for."""
    from megatron_adalrs.planning.dry_run import dry_run

    print(wrap(dry_run(config)), flush=True)


def pretrain(config: Config, is_first_rank: bool) -> int:
    """Train until the run is complete or interrupted, and return the exit code.

    Raises:
        ValueError, OSError: Training failed after it had begun.
    """
    # Import torch and DeepSpeed only here, so that --help and mistakes in the flags are answered quickly.
    from megatron_adalrs.distributed.heartbeat import heartbeat_monitor
    from megatron_adalrs.distributed.rendezvous import rendezvous_errors
    from megatron_adalrs.engine import end_distributed, show_library_messages
    from megatron_adalrs.training.build import build_trainer
    from megatron_adalrs.training.consistency_check import RanksDiffer
    from megatron_adalrs.training.resolve import join_ranks

    show_library_messages(config.run.verbose)
    trainer = None
    try:
        with rendezvous_errors():
            mesh, attempt = join_ranks(config)
        timeout = config.run.heartbeat_timeout
        with heartbeat_monitor(mesh, attempt, timeout, lambda: trainer.state.step if trainer else None):
            trainer = build_trainer(config)
            return trainer.train()
    except RanksDiffer as error:
        return refuse(error, is_first_rank, RANKS_DIFFER)
    except (ValueError, OSError) as error:
        if trainer is not None:
            raise
        return refuse(error, is_first_rank)
    finally:
        end_distributed()


def refuse(error: Exception, is_first_rank: bool, exit_code: int = USAGE_ERROR) -> int:
    """Print the error on the first rank and return the exit code."""
    if is_first_rank:
        text = f"error: {error}"
        print(wrap(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
    wait_for_first_rank(is_first_rank)
    return exit_code


def wait_for_first_rank(is_first_rank: bool) -> None:
    """Sleep on all ranks but the first.

    Launchers kill all ranks when one exits, and the rank that prints the error may be slower than the others.
    """
    if not is_first_rank:
        time.sleep(FIRST_RANK_SECONDS)


def leave(exit_code: int) -> NoReturn:
    """End the process without finalizing the interpreter.

    Threads of the process group may still run destructors while the interpreter is finalized, which has
    aborted ranks (SIGABRT) after their work was complete. A launcher takes that for a failure.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader of a pipe may be gone
            stream.flush()
    os._exit(exit_code)


def run() -> NoReturn:
    """Pretrain with the command line of the process, and end the process."""
    leave(main())


if __name__ == "__main__":
    run()
