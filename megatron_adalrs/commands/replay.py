"""Run the AdaLRS search on a recorded training loss, and estimate which differences its noise lets it detect.

    megatron-adalrs replay runs/fixed                         # run directory of this package
    megatron-adalrs replay loss.csv --train-iters 50000 --adalrs.mode robust
    megatron-adalrs replay tensorboard/ --tag train/loss --json

A record has one loss per step and cannot show how a trial would have ended. The field "basis" of the output
says what each figure is based on.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic.fields import FieldInfo

from megatron_adalrs.adalrs.settings import AdaLRSSettings, uses_setting
from megatron_adalrs.cli.arguments import adalrs_flags
from megatron_adalrs.cli.program import parse_flags, reports_errors

if TYPE_CHECKING:
    from megatron_adalrs.analysis.loss_log import LossLog
    from megatron_adalrs.analysis.replay_report import Report

MODES: tuple[Literal["paper", "robust"], ...] = ("paper", "robust")
_MODE = FieldInfo(
    annotation=Literal["paper", "robust"] | None,
    default=None,
    description="Rule of the search, see `megatron-adalrs pretrain --help`. Default: both.",
)


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Replay the recorded loss and print the decisions.

    Returns:
        0, or 2 if the record cannot be read or replayed.
    """
    flags: Any = parse_flags(_flags({}), __doc__, arguments)
    from megatron_adalrs.analysis.loss_log import read_loss_log
    from megatron_adalrs.analysis.replay_report import as_json
    from megatron_adalrs.analysis.replay_tables import print_report

    log = read_loss_log(flags.loss_log, flags.column, flags.tag)
    config = log.run.config if log.run else {}
    # Parsed again with the settings of the recorded run as defaults.
    flags = parse_flags(_flags(_defaults(config)), __doc__, arguments)
    reports, refused = replay_modes(flags, log, config)
    if flags.json:
        print(json.dumps(as_json(reports, refused)))
    else:
        print_report(log, list(reports.values()), refused)
    return 0


def replay_modes(flags: Any, log: LossLog, config: Mapping[str, Any]) -> tuple[dict[str, Report], list[str]]:
    """Replay the record in each chosen mode.

    Args:
        flags: Parsed command line.
        log: The recorded loss.
        config: Configuration of the recorded run; empty if the record is not one of this package's.

    Returns:
        Reports by mode, and for each other mode the reason why it cannot be replayed.

    Raises:
        ValueError: No mode can be replayed.
    """
    from megatron_adalrs.analysis.replay_report import report

    train_iters = flags.train_iters or config.get("train_iters") or log.steps
    warmup = flags.lr_warmup_iters
    if warmup is None:
        warmup = config.get("lr_warmup_iters") or 0
    reports: dict[str, Report] = {}
    reasons: dict[str, str] = {}
    for mode in [flags.adalrs.mode] if flags.adalrs.mode else MODES:
        try:
            settings = _settings(mode, flags, config)
            reports[mode] = report(settings, train_iters, log, warmup, flags.unpaired)
        except ValueError as error:
            reasons[mode] = str(error)
    refused = [f"{mode} mode: {reason}" for mode, reason in reasons.items()]
    if not reports:
        different = set(reasons.values())
        raise ValueError("; ".join(refused) if len(different) > 1 else different.pop())
    return reports, refused


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the search settings of the recorded run, except those that this command chooses itself."""
    return {name: value for name, value in config.get("adalrs", {}).items() if name != "mode"}


def _settings(mode: Literal["paper", "robust"], flags: Any, config: Mapping[str, Any]) -> AdaLRSSettings:
    """Return the settings of a replay in this mode.

    Settings of the other mode that the recorded run had are left out; those that a flag gives are refused.
    """
    recorded = _defaults(config)
    values = {
        name: value
        for name, value in vars(flags.adalrs).items()
        if uses_setting(mode, name) or value != recorded.get(name)
    }
    return AdaLRSSettings(**values | {"mode": mode})


def _flags(adalrs: dict[str, Any]) -> type:
    group = adalrs_flags(adalrs, mode=_MODE)

    texts = {
        "loss_log": "CSV or JSON-lines file, TensorBoard folder, or run directory of this package.",
        "train_iters": "Steps of the run. Default: those of the recorded run, or the last recorded step.",
        "lr_warmup_iters": "Warm-up steps; no search begins during them. Default: the recorded run's, or 0.",
        "column": "Column or key of the loss. Default: the one with the name of a training loss.",
        "tag": "TensorBoard tag of the loss. Default: the one with the name of a training loss.",
        "unpaired": "Noise of the difference between two trials on the same batches, relative to that of "
        "trials on different batches. Default: measured in the races of the recorded run, or 0.12 (0.05 to "
        "0.18 was measured). 1: different batches.",
        "json": "Print a JSON object.",
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


if __name__ == "__main__":
    sys.exit(main())
