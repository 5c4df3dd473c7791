"""The paragraph at the top of the page: what was asked, what the search did, what it cost and the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from megatron_adalrs.metrics.kept_steps import LOSS_GUARD
from megatron_adalrs.metrics.records import DecisionRecord, Evaluation
from megatron_adalrs.metrics.run_log import RunLog
from megatron_adalrs.report.drawing import Run, event_name
from megatron_adalrs.report.summary import VERDICT_ORDER, given_rate, training_loss, verdict_counts
from megatron_adalrs.utils import format as fmt

_VERDICTS = frozenset(VERDICT_ORDER) - {"running"}


def outcome(run: Run, runs: Sequence[Run]) -> str:
    """Return a paragraph on a run of the page.

    It names the given rate, the rate that the search found and why, the cost of the search, the final loss,
    and the difference to each run of the page that trained at a fixed rate.
    """
    sentences = [*_search(run.log), *_cost(run.log), *_result(run.log)]
    if search_decisions(run.log):
        sentences += [
            sentence
            for other in runs
            if other is not run and not search_decisions(other.log)
            for sentence in _comparison(run.log, other)
        ]
    return " ".join(sentences)


def search_decisions(log: RunLog) -> list[DecisionRecord]:
    """Return the decisions of the run without those of the loss guard."""
    return [decision for decision in log.decisions if not decision.event.startswith(LOSS_GUARD)]


def _search(log: RunLog) -> Iterator[str]:
    """Yield the sentences on the rates and on the decisions that led from one to the other."""
    decisions = search_decisions(log)
    given = given_rate(log)
    if not decisions:
        rate = "a fixed rate" if given is None else f"the given rate of {fmt.scientific(given)}"
        yield f"The run trained at {rate}; it has no decision of a search."
        return
    if given is None:
        yield f"The search changed the given learning rate by × {log.scale:.4g}."
    elif log.scale == 1:
        yield f"The given learning rate was {fmt.scientific(given)}; the search kept it."
    else:
        found = f"{fmt.scientific(given * log.scale)} (× {log.scale:.4g})"
        yield f"The given learning rate was {fmt.scientific(given)}; the search found {found}."
    yield _trials(log)
    last = decisions[-1]
    verdict = next((d for d in reversed(decisions) if d.event in _VERDICTS), None)
    if verdict is not None and verdict is not last:
        yield f"The last trial {_why(verdict)}."
    yield f"The last decision {_why(last)}."
    if last.event != "search_ended":
        yield "The search had not ended."


def _trials(log: RunLog) -> str:
    if not log.trials:
        return "It made no trial."
    return f"It made {len(log.trials)} trial{'s' if len(log.trials) > 1 else ''}: {verdict_counts(log)}."


def _why(decision: DecisionRecord) -> str:
    reason = decision.reason.rstrip(". ") or "no reason was recorded"
    return f"({event_name(decision.event)}, step {fmt.count(decision.step)}): {reason}"


def _cost(log: RunLog) -> Iterator[str]:
    search = sum(decision.discarded_steps for decision in search_decisions(log))
    guard = sum(d.discarded_steps for d in log.decisions if d.event.startswith(LOSS_GUARD))
    executed = log.totals.total_steps
    of = f"of {fmt.count(executed)} executed steps"
    if search:
        yield f"The search discarded {fmt.count(search)} {of} ({fmt.share(search, executed)})."
    elif search_decisions(log):
        yield f"The search discarded none {of}."
    if guard:
        yield f"The loss guard discarded {fmt.count(guard)} {of} ({fmt.share(guard, executed)})."


def _last_validation(log: RunLog) -> Evaluation | None:
    return next((e for e in reversed(log.evaluations) if e.split == "valid"), None)


def _result(log: RunLog) -> Iterator[str]:
    ended = bool(log.events) and log.events[-1].event == "end"
    last = _last_validation(log)
    training = training_loss(log)
    which = "final" if ended else "last"
    if last is not None:
        yield f"The {which} validation loss is {last.loss:.4f} (step {fmt.count(last.step)})."
    elif training is not None:
        yield f"No validation was recorded; the {which} training loss is {training.text} ({training.note})."
    else:
        yield "No finite loss was recorded."
    if not ended:
        yield f"The run has not finished: step {fmt.count(log.totals.useful_steps)}."


def _comparison(log: RunLog, fixed: Run) -> Iterator[str]:
    """Yield how the final loss differs from that of a run at a fixed rate, and the compute of both."""
    ours, theirs = _last_validation(log), _last_validation(fixed.log)
    rate = given_rate(fixed.log)
    name = fixed.name if rate is None else f"{fixed.name} (fixed at {fmt.scientific(rate)})"
    at = (
        ""
        if ours is None or theirs is None or ours.step == theirs.step
        else f" at step {fmt.count(theirs.step)}"
    )
    if ours is None or theirs is None:
        yield f"The difference to {name} is unknown: not both runs have a validation loss."
        return
    difference = ours.loss - theirs.loss
    if not math.isfinite(difference):
        yield f"The validation loss of {name}{at} is {theirs.loss:.4f}."
    elif round(difference, 4) == 0:
        yield f"This is the same as that of {name}{at}."
    else:
        direction = "lower" if difference < 0 else "higher"
        yield f"This is {abs(difference):.4f} {direction} than the {theirs.loss:.4f} of {name}{at}."
    mine, other = log.totals.total_steps, fixed.log.totals.total_steps
    if mine != other:
        yield f"The compute differs: {fmt.count(mine)} executed steps, against {fmt.count(other)}."
