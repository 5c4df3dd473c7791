"""Fields of the records in `metrics.jsonl` and `decisions.jsonl`.

To add a metric, add its field to `TrainStep`, write its value in `RunRecorder.log_step`
(`training/run_recorder.py`), and add its name to `Scalars.TRAIN` (`scalars.py`) to show it in dashboards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from megatron_adalrs.adalrs.decision import DecisionFields

Count = Annotated[int, Field(ge=0, lt=2**62)]
"""Number of steps or tokens; the sum of two fits into an int64."""


@dataclass(frozen=True)
class TrainStep:
    """One executed optimizer step."""

    kind: Literal["train"]
    step: Count
    """Kept steps, this one included."""
    total_steps: Count
    """Executed steps, this one and those of undone trials included."""
    loss: float | None
    """Nats per token; may be NaN or infinite. None if no target of the step counts."""
    lr: float
    scale: float
    consumed_tokens: Count
    """Tokens of the kept steps up to this one."""
    discarded_tokens: Count
    """Tokens of the trials undone before this step."""
    phase: str
    time: float
    """Unix time in seconds."""
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    flops_per_second: float | None = None
    seconds: float | None = None
    memory_bytes: float | None = None
    applied: bool = True
    """False if the optimizer skipped the update, for example after an overflow or without a loss."""


@dataclass(frozen=True)
class Evaluation:
    """Loss (nats per token) and perplexity on a held-out part of the data."""

    kind: Literal["eval"]
    split: str
    """`valid` or `test`; `valid/NAME` for one of several corpora, whose mean is `valid`."""
    step: Count
    total_steps: Count
    loss: float
    perplexity: float
    time: float


@dataclass(frozen=True)
class CorpusUse:
    """Data of a corpus that the kept steps have consumed."""

    name: str
    samples: Count
    tokens: Count
    epochs: float
    """Passes over its training part."""


@dataclass(frozen=True)
class CorporaUse:
    """Data of each training corpus that the kept steps have consumed."""

    kind: Literal["corpora"]
    step: Count
    total_steps: Count
    corpora: tuple[CorpusUse, ...]
    time: float


@dataclass(frozen=True)
class RunEvent:
    """Start, resume, interruption or end of a process, with properties of the run."""

    kind: Literal["run"]
    event: str
    step: Count
    total_steps: Count
    time: float
    parameters: int | None = None
    world_size: int | None = None
    data_order: str | None = None
    snapshot_bytes: int | None = None
    snapshot_seconds: float | None = None
    weights_from: str | None = None
    """Checkpoint that the initial weights were loaded from."""
    weights_step: int | None = None
    message: str | None = None
    changed: dict[str, tuple[Any, Any]] | None = None
    """Fields that differ from those of the resumed checkpoint, with its value and that of this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRecord(DecisionFields):
    """One line of the decision journal: a decision that was applied, and when."""

    event: str
    """Value of the decision's `Event` or `GuardEvent`."""
    step: Count
    """Kept steps after the decision is applied; after an undone trial, the step of the rollback."""
    total_steps: Count
    """Executed steps, those of undone trials included."""
    time: float
    """Unix time in seconds."""
    snapshot_seconds: float | None = None
    """Seconds that snapshots took."""


MetricsRecord = TrainStep | Evaluation | CorporaUse | RunEvent
METRICS_LINE: TypeAdapter[MetricsRecord] = TypeAdapter(Annotated[MetricsRecord, Field(discriminator="kind")])
DECISIONS_LINE = TypeAdapter(DecisionRecord)
