"""Tell what either mode of AdaLRS would decide on a recorded training loss, and what noise lets it tell.

    python tools/replay.py runs/fixed                         # the folder of a run of this package
    python tools/replay.py loss.csv --train-iters 50000 --adalrs.mode robust
    python tools/replay.py tensorboard/ --tag train/loss --json

A record has one loss a step; what a trial would have shown is not on it. See "basis" in what is printed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic.fields import FieldInfo

from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.cli.arguments import adalrs_flags

MODES = ("paper", "robust")
_MODE = FieldInfo(
    annotation=Literal["paper", "robust"] | None,
    default=None,
    description="Rule of the search, see pretrain_gpt.py --help. Default: both, one after the other.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 where there is nothing to replay; one sentence says why."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = tyro.cli(_flags({}), args=given, description=__doc__)
    from megatron_adalrs.analysis.loss_log import read_loss_log
    from megatron_adalrs.analysis.replay_report import as_json, report
    from megatron_adalrs.analysis.replay_tables import print_report

    try:
        log = read_loss_log(flags.loss_log, flags.column, flags.tag)
        config = log.run.config if log.run else {}
        flags = tyro.cli(_flags(_defaults(config)), args=given, description=__doc__)
        train_iters = flags.train_iters or config.get("train_iters") or log.steps
        warmup = (
            flags.lr_warmup_iters if flags.lr_warmup_iters is not None else config.get("lr_warmup_iters") or 0
        )
        reports = {}
        refused = []
        for mode in [flags.adalrs.mode] if flags.adalrs.mode else MODES:
            try:
                settings = AdaLRSSettings(**vars(flags.adalrs) | {"mode": mode})
                reports[mode] = report(settings, train_iters, log, warmup, flags.unpaired)
            except ValueError as error:
                refused.append(f"{mode} mode: {error}")
        if not reports:
            reasons = dict.fromkeys(reason.partition(" mode: ")[2] for reason in refused)
            raise ValueError("; ".join(refused) if len(reasons) > 1 else refused[0].partition(" mode: ")[2])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.json:
        print(json.dumps(as_json(reports, refused)))
    else:
        print_report(log, list(reports.values()), refused)
    return 0


def _defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run on record, but for what this program has its own default for."""
    return {
        name: value for name, value in config.get("adalrs", {}).items() if name not in ("mode", "enabled")
    }


def _flags(adalrs: dict[str, Any]) -> type:
    enabled = FieldInfo(
        annotation=bool, default=True, description="There is nothing to replay without a search."
    )
    group = adalrs_flags(adalrs, mode=_MODE, enabled=enabled)

    texts = {
        "loss_log": "CSV or JSON-lines file, TensorBoard folder, or folder of a run of this package.",
        "train_iters": "Steps of the run. Default: the run's, or the last step on record.",
        "lr_warmup_iters": "Steps of warm-up, within which no search begins. Default: the run's, or 0.",
        "column": "Column or key of the loss. Default: the one that is called like a training loss.",
        "tag": "TensorBoard tag of the loss. Default: likewise.",
        "unpaired": "Noise of the difference of two arms on the same batches, in parts of what it is for independent "
        "losses. Default: as in the run's own races, or 0.12 (0.05 to 0.18 was measured). 1: as on fresh batches.",
        "json": "Print everything as one JSON object.",
    }

    def flag(name: str, kind: Any, *default: Any) -> tuple[Any, ...]:
        return (name, Annotated[kind, tyro.conf.arg(help=texts[name])], *default)

    return dataclasses.make_dataclass(
        "Flags",
        [
            flag("loss_log", tyro.conf.Positional[Path]),
            ("adalrs", group),
            flag("train_iters", int | None, None),
            flag("lr_warmup_iters", int | None, None),
            flag("column", str | None, None),
            flag("tag", str | None, None),
            flag("unpaired", float | None, None),
            flag("json", bool, False),
        ],
    )
