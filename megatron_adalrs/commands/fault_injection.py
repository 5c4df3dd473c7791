"""Kill small runs of two ranks at random instants, mostly during a save, and check that nothing is lost.

    megatron-adalrs fault-injection                                 # 200 kills
    megatron-adalrs fault-injection --kills 20 --seed 7 --json      # print the figures as a JSON object

After every SIGKILL all published checkpoints are compared with their hashes: none may be damaged, and the
newest may not be older than one that was published before. The run is then resumed with --auto-resume. When
it is complete, its losses must be bit-identical to those of a run that was never killed. The ZeRO stage,
--save-interval (1 to 3), --async-save, the learning-rate search and the choice of killed ranks (both at once,
one after the other, only one) vary between the runs.

Half of the attempts are disturbed as well. A second job is started in the same run directory, or a resume
with another --seed is tried: both must be refused, and the run must not change. The run is rolled back to its
oldest checkpoint with --keep-last 1: it must go on from there, also after a kill. Or no file can grow beyond
a limit, as on a full disk: no checkpoint is written, and none may be damaged.

The exit code is 0 if no check failed. At the first failed check the command stops, keeps its folder and
returns 1.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_adalrs.cli.program import INTERRUPTED, parse_flags, reports_errors

if TYPE_CHECKING:
    from megatron_adalrs.fault_injection.campaign import Figures


@dataclass(frozen=True)
class Arguments:
    kills: int = 200
    """Number of SIGKILLs."""
    seed: int = 0
    """Seed of the random choices. The instants of the kills also depend on the speed of the machine."""
    output: Path | None = None
    """Folder to work in; it must be new or empty. Default: a temporary folder."""
    json: bool = False
    """Print the figures as a JSON object."""


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign and print its figures.

    Returns:
        0; 1 if a check failed; 2 if a flag is not valid; 130 after Ctrl-C.
    """
    flags = parse_flags(Arguments, __doc__, arguments)
    output = empty_folder(flags)
    from megatron_adalrs.commands.pretrain import main as pretrain
    from megatron_adalrs.fault_injection.campaign import Campaign

    began = time.monotonic()
    try:
        figures = Campaign(output, pretrain, flags.kills, flags.seed).run(print_progress)
    except KeyboardInterrupt:
        shutil.rmtree(output, ignore_errors=True)
        return INTERRUPTED
    content = figures.as_dict() | {"seconds": round(time.monotonic() - began), "seed": flags.seed}
    if figures.wrong:
        print(f"the failed run is kept in {output}; the last output of its ranks:", file=sys.stderr)
        print("\n".join((output / "output.txt").read_text().splitlines()[-20:]), file=sys.stderr)
    else:
        shutil.rmtree(output)
    if flags.json:
        print(json.dumps(content))
    else:
        print_figures(content)
    return 1 if figures.wrong else 0


def empty_folder(flags: Arguments) -> Path:
    """Create the folder to work in.

    Raises:
        ValueError: A flag is not valid, or the folder is not empty.
        OSError: The folder cannot be created.
    """
    if flags.kills < 1:
        raise ValueError(f"--kills={flags.kills}: must be at least 1")
    if flags.output is None:
        return Path(tempfile.mkdtemp(prefix="fault-injection-"))
    flags.output.mkdir(parents=True, exist_ok=True)
    if any(flags.output.iterdir()):
        raise ValueError(f"--output={flags.output}: must be empty")
    return flags.output.resolve()


def print_progress(figures: Figures) -> None:
    """Print a status line after a kill."""
    saving = figures.interrupted.total() - figures.interrupted["nothing"]
    kills = f"{figures.kills} kills, {saving} during a save"
    runs = f"{figures.runs} runs completed, {len(figures.wrong)} wrong"
    print(f"\r{kills}; {runs}", end="", file=sys.stderr, flush=True)


def print_figures(content: dict[str, Any]) -> None:
    """Print the figures of a campaign as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", title="fault-injection campaign", show_header=False)
    for name, value in content.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {count}" for part, count in value.items())
        elif isinstance(value, list):
            value = "\n".join(value) or "0"
        table.add_row(name.replace("_", " "), str(value))
    console = Console()
    console.print()
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
