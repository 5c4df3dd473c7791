"""The lines of `metrics.jsonl` and `decisions.jsonl`: their fields, and a reader that names a wrong line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from megatron_adalrs.adalrs.decision import DecisionFields

Record = TypeVar("Record")
Count = Annotated[int, Field(ge=0, lt=2**62)]
"""Of steps or tokens; two of them add up within an int64."""


@dataclass(frozen=True)
class TrainStep:
    """One executed optimizer step."""

    kind: Literal["train"]
    step: Count
    """Kept steps, this one included."""
    total_steps: Count
    """Executed steps, this one and those of undone trials included."""
    loss: float | None
    """Nats per token; may be NaN or infinite."""
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
    """False where the optimizer skipped the update, for example after an overflow."""


@dataclass(frozen=True)
class Evaluation:
    """Loss (nats per token) and perplexity on a held-out part of the data."""

    kind: Literal["eval"]
    split: str
    """valid or test; valid/NAME for one of several corpora, whose mean is valid."""
    step: Count
    total_steps: Count
    loss: float
    perplexity: float
    time: float


@dataclass(frozen=True)
class CorpusUse:
    """What the kept steps have consumed of a corpus."""

    name: str
    samples: Count
    tokens: Count
    epochs: float
    """Passes over its training part."""


@dataclass(frozen=True)
class CorporaUse:
    """What the kept steps have consumed of the corpora of the training data."""

    kind: Literal["corpora"]
    step: Count
    total_steps: Count
    corpora: tuple[CorpusUse, ...]
    time: float


@dataclass(frozen=True)
class RunEvent:
    """Start, resume, interruption or end of a process, with what it had to say about itself."""

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
    """Checkpoint whose weights the run began with."""
    weights_step: int | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRecord(DecisionFields):
    """One line of the decision journal: a decision that was applied, and when."""

    event: str
    """Value of the decision's `Event` or `GuardEvent`."""
    step: Count
    """Kept steps once the decision was applied; after an undone trial, those at its start."""
    total_steps: Count
    """Executed steps, those of undone trials included."""
    time: float
    """Unix time in seconds."""
    snapshot_seconds: float | None = None
    """Seconds that snapshots took."""


MetricsRecord = TrainStep | Evaluation | CorporaUse | RunEvent
METRICS_LINE: TypeAdapter[MetricsRecord] = TypeAdapter(Annotated[MetricsRecord, Field(discriminator="kind")])
DECISIONS_LINE = TypeAdapter(DecisionRecord)


def read_records(file: Path, adapter: TypeAdapter[Record]) -> Iterator[Record]:
    """The records of a JSON-lines file, in order.

    A last line that is no complete JSON value is left out: the process died while writing it.

    Raises:
        ValueError: any other line that is not valid JSON, or lacks a field or has one of the wrong type; the
            message names file, line and field.
    """
    with file.open("rb") as lines:
        torn: str | None = None
        for number, line in enumerate(lines, start=1):
            if torn is not None:
                raise ValueError(torn)
            try:
                yield adapter.validate_json(line, strict=True)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                field = f"{first['loc'][-1]}: " if first["loc"] else ""
                complaint = f"{file}:{number}: {field}{first['msg']}"
                if first["type"] != "json_invalid":
                    raise ValueError(complaint) from None
                torn = complaint
