"""Measure what this framework costs, paired within one run, and print the figures as JSON.

    python tools/benchmark.py --what step       # tokens/s of one rank against a hand-written PyTorch loop
    python tools/benchmark.py --what watching   # a step with AdaLRS watching against the same step without
    python tools/benchmark.py --what snapshot   # capture and restore against a bare copy; bytes against the estimate
    python tools/benchmark.py --what saving     # what --async-save makes the training wait for, against a bare copy
    python tools/benchmark.py --what parallel   # dp2, tp2 and pp2 against one rank; bytes against the plan
    python tools/benchmark.py --what overhead   # a fixed rate against AdaLRS, both modes, at dp 1 and 2 and ZeRO 0-3
    python tools/benchmark.py --what preprocessing    # one worker, and one a core, against a plain loop
    python tools/benchmark.py --what index      # the order of 10^9 tokens: built, and opened from the cache

How each is measured is told by its file in tools/benchmarks/.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from megatron_adalrs.benchmarks.options import SHAPE, Arguments


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = tyro.cli(Arguments, description=__doc__, args=arguments)
    try:
        with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
            results = measure(parsed, Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results, indent=2))
    return 0


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """What was asked for. It imports no more than that needs: processes that it starts import this file, too."""
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
