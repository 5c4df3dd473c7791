"""Pretrain a GPT: `deepspeed pretrain_gpt.py --config FILE.yaml [flags]`. See `--help`."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from megatron_adalrs.cli.arguments import parse_arguments
from megatron_adalrs.distributed.launcher import adopt_launch_environment

SECONDS_FOR_THE_FIRST_RANK = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 the run is complete, 2 it was asked for something impossible, 143 it was interrupted and saved.

    With --check-ranks-every also 3: ranks have come apart. 4: another rank was lost. With --loss-guard.policy also 5:
    bad numbers ended it.
    """
    adopt_launch_environment()
    is_first_rank = os.environ.get("RANK", "0") == "0"
    try:
        config = parse_arguments(sys.argv[1:] if arguments is None else arguments, print_errors=is_first_rank)
        if config.run.dry_run and not is_first_rank:
            return 0
        # Imports torch and DeepSpeed: only now, so that --help and mistakes are answered at once.
        if config.run.dry_run:
            from megatron_adalrs.planning.dry_run import dry_run

            print(dry_run(config), flush=True)
            return 0
        from megatron_adalrs.distributed.heartbeat import heartbeat_monitor, rendezvous_errors
        from megatron_adalrs.training.build import build_trainer, end_distributed, join_ranks
        from megatron_adalrs.training.consistency_check import RanksDiffer
    except (ValueError, OSError) as error:
        return refuse(error, is_first_rank)
    except SystemExit as ended:  # --help, or flags that cannot be parsed: what there is to say is printed
        if ended.code:
            let_the_first_rank_end(is_first_rank)
        raise
    trainer = None
    try:
        try:
            with rendezvous_errors():
                mesh, attempt = join_ranks(config)
            timeout = config.run.heartbeat_timeout
            with heartbeat_monitor(mesh, attempt, timeout, lambda: trainer.state.step if trainer else None):
                trainer = build_trainer(config)
                return trainer.train()
        except (ValueError, OSError) as error:
            if trainer is not None:
                raise
            return refuse(error, is_first_rank)
    except RanksDiffer as error:
        return refuse(error, is_first_rank, 3)
    finally:
        end_distributed()


def refuse(error: Exception, is_first_rank: bool, exit_code: int = 2) -> int:
    if is_first_rank:
        print(f"error: {error}", file=sys.stderr, flush=True)
    let_the_first_rank_end(is_first_rank)
    return exit_code


def let_the_first_rank_end(is_first_rank: bool) -> None:
    """Launchers end all ranks when one ends, and the first, which tells why, may be later than the others."""
    if not is_first_rank:
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)


def leave(exit_code: int) -> NoReturn:
    """End the process, but not through the interpreter's end, where threads of the process group may still meet
    destructors: a rank that had done all its work has died there of SIGABRT, which the launcher takes for a failure.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody may be reading any more
            stream.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    leave(main())
