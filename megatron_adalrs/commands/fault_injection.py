"""Kill small runs of two ranks at random instants, most of them during a save, and see whether anything is lost.

    python tools/chaos.py                                 # 200 kills
    python tools/chaos.py --kills 20 --seed 7 --json      # the figures as one JSON object

After every SIGKILL each published checkpoint is compared with its hashes, none may be damaged, and the newest may not
be older than what was seen published before. The run then goes on with --auto-resume; when it is complete, its losses
must be, to the bit, those of a run that was never killed. ZeRO stages, --save-interval 1 to 3, --async-save, a search
for the learning rate and who is killed (both ranks, one after the other, one alone) change from life to life or run
to run. Exit code 0 if nothing was wrong, 1 if something was: the campaign stops there and leaves its folder.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro


@dataclass(frozen=True)
class Arguments:
    kills: int = 200
    """SIGKILLs."""
    seed: int = 0
    """Of what is drawn: instants depend on the machine too."""
    output: Path | None = None
    """Folder to work in, which must be empty or not there. Default: a temporary one."""
    json: bool = False
    """Print the figures as one JSON object."""


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 1 where something was lost or wrong, 2 where it was asked for something impossible, 130."""
    flags = tyro.cli(Arguments, description=__doc__, args=arguments)
    try:
        output = empty_folder(flags)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from megatron_adalrs.fault_injection.campaign import Campaign

    began = time.monotonic()
    try:
        figures = Campaign(output, flags.kills, flags.seed).run(tell)
    except KeyboardInterrupt:
        shutil.rmtree(output, ignore_errors=True)
        return 130
    content = figures.as_dict() | {"seconds": round(time.monotonic() - began), "seed": flags.seed}
    if figures.wrong:
        print(f"what was wrong is in {output}; its ranks said, at last:", file=sys.stderr)
        print("\n".join((output / "said.txt").read_text().splitlines()[-20:]), file=sys.stderr)
    else:
        shutil.rmtree(output)
    print(json.dumps(content)) if flags.json else print_figures(content)
    return 1 if figures.wrong else 0


def empty_folder(flags: Arguments) -> Path:
    """Raises ValueError, OSError: a flag asks for something impossible."""
    if flags.kills < 1:
        raise ValueError(f"--kills={flags.kills}: must be at least 1")
    if flags.output is None:
        return Path(tempfile.mkdtemp(prefix="chaos-"))
    flags.output.mkdir(parents=True, exist_ok=True)
    if any(flags.output.iterdir()):
        raise ValueError(f"--output={flags.output}: must be empty")
    return flags.output.resolve()


def tell(figures: Any) -> None:
    """A line after every kill."""
    saving = figures.interrupted.total() - figures.interrupted["nothing"]
    print(
        f"\r{figures.kills} kills, {saving} during a save; {figures.runs} runs completed, {len(figures.wrong)} wrong",
        end="", file=sys.stderr, flush=True,
    )  # fmt: skip


def print_figures(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", title="kill campaign", show_header=False)
    for name, value in content.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {count}" for part, count in value.items())
        elif isinstance(value, list):
            value = "\n".join(value) or "0"
        table.add_row(name.replace("_", " "), str(value))
    console = Console()
    console.print()
    console.print(table)
