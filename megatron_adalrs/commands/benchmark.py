"""Measure the cost of this framework against a baseline in the same process, and print the figures as JSON.

    --what step           tokens/s of one rank, compared with a hand-written PyTorch loop
    --what watching       a step observed by AdaLRS, compared with the same step without
    --what snapshot       capture and restore, compared with a plain copy; bytes, compared with the estimate
    --what saving         time for which --async-save blocks training, compared with a plain copy
    --what parallel       dp2, tp2 and pp2, compared with one rank; bytes, compared with the plan
    --what overhead       fixed rate and AdaLRS in both modes, with dp 1 and 2 and ZeRO 0-3
    --what preprocessing  one worker and one per core, compared with a plain loop
    --what index          sample order of 10^9 tokens: time to build it and to open it

The modules of megatron_adalrs/benchmarks/ describe how each is measured.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_adalrs.benchmarks.options import SHAPE, Arguments
from megatron_adalrs.cli.program import parse_flags, reports_errors


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark and print its figures.

    Returns:
        0, or 2 if a flag is not valid or there is not enough space on disk.
    """
    flags = parse_flags(Arguments, __doc__, arguments)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        results = measure(flags, Path(folder))
    print(json.dumps(results, indent=2))
    return 0


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Run the chosen benchmark.

    Imports only what it needs, because the processes that a benchmark starts import this module too.
    """
    if arguments.what == "parallel":
        from megatron_adalrs.benchmarks.parallel import measure_parallel

        return measure_parallel(arguments.zero_stage, arguments.bf16, blocks=max(3, arguments.pairs // 5))
    if arguments.what == "overhead":
        from megatron_adalrs.benchmarks.overhead import measure_overhead, table

        results = measure_overhead(
            {name: getattr(arguments, name) for name in SHAPE}, arguments.pairs, folder
        )
        print(table(results))
        return results
    if arguments.what == "preprocessing":
        from megatron_adalrs.benchmarks.preprocessing import measure_preprocessing

        return measure_preprocessing(
            arguments.corpus_mb, max(3, arguments.pairs // 5), arguments.workers, folder
        )
    if arguments.what == "index":
        from megatron_adalrs.benchmarks.index import measure_index

        return measure_index(arguments.tokens, arguments.documents, folder)
    from megatron_adalrs.benchmarks.steps import measure_steps

    return measure_steps(arguments, folder)


if __name__ == "__main__":
    sys.exit(main())
