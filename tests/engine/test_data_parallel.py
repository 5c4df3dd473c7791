"""The data-parallel engine: evaluation, agreement of ranks on results and errors, counters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_adalrs.adalrs.controller import build_controller
from megatron_adalrs.adalrs.decision import Decision
from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.distributed.collectives import gather_numbers, on_every_rank, on_first_rank
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import DataParallelEngine
from tests.helpers.ranks import RankFailure, Ranks
from tests.helpers.runs import micro_batches, start, tiny_config


def evaluation(values: dict[str, Any]) -> tuple[float, float]:
    config, mesh = tiny_config(**values), ProcessMesh.from_environment()
    engine = DataParallelEngine(config, 256, mesh)
    steps = [micro_batches(config, mesh, step) for step in range(3)]
    before = engine.evaluate(iter(steps))
    return before, engine.evaluate(iter(steps))


def test_evaluation_is_the_same_on_any_mesh_and_pure(one_rank: Ranks, two_ranks: Ranks) -> None:
    values = {"hidden_dropout": 0.5}
    ((expected, again),) = one_rank.run(evaluation, values)
    assert expected == again
    for loss, _ in two_ranks.run(evaluation, values):
        assert loss == pytest.approx(expected, rel=1e-6)


def has_compiled_reduction() -> bool:
    return hasattr(torch.ops.deepspeed, "inference_all_reduce_")


def test_training_compiles_no_reduction(two_ranks: Ranks) -> None:
    """DeepSpeed would compile, for half a minute at the first start, a reduction that only inference uses."""
    assert two_ranks.run(has_compiled_reduction) == [False, False]


def counters_of_an_optimizer_with_numbers() -> list[list[dict[str, int]]]:
    """Return optimizer state that is no tensor, such as a step count, before and after it is restored."""
    config, mesh = tiny_config(), ProcessMesh.from_environment()
    engine = DataParallelEngine(config, 256, mesh)
    engine.train_batch(micro_batches(config, mesh, 0))
    first, second, *_ = engine._base_optimizer.state.values()
    first["count"] = 3
    saved = engine.counters()
    first["count"] = second["born_since"] = 7
    engine.set_counters(saved)
    return [saved["state"][:2], engine.counters()["state"][:2]]


def test_counters_restore_non_tensor_state(one_rank: Ranks) -> None:
    ((saved, restored),) = one_rank.run(counters_of_an_optimizer_with_numbers)
    assert saved == [{"count": 3}, {}]
    assert restored == [{"count": 3}, {"born_since": 0}]


def stop_asked_by(rank: int) -> bool:
    config, mesh = tiny_config(), ProcessMesh.from_environment()
    engine = DataParallelEngine(config, 256, mesh)
    return engine.train_batch(micro_batches(config, mesh, 0), stop=mesh.rank == rank).stop_requested


def test_a_stop_request_reaches_all_ranks(two_ranks: Ranks) -> None:
    assert two_ranks.run(stop_asked_by, 1) == [True, True]
    assert two_ranks.run(stop_asked_by, 5) == [False, False]


def decisions_on_losses_that_differ(values: dict[str, Any]) -> dict[str, Any]:
    """Run a step whose loss has different last bits on each rank, and observe it in a trial.

    A loss above all before it aborts a trial: here that limit is the very loss, so that one bit decides.
    """
    config, mesh, engine = start(values)
    own: list[float] = []

    def nudged(loss: torch.Tensor) -> torch.Tensor:
        loss = loss * (1 + mesh.rank * 2.0**-22)
        own.append(float(loss.detach()))
        return loss

    if mesh.pipe.size == 1:
        engine.module.register_forward_hook(lambda module, inputs, loss: nudged(loss))
    elif mesh.pipe.is_last:
        loss_of = engine.module.loss_fn
        engine.module.loss_fn = lambda *arguments: nudged(loss_of(*arguments))
    loss = engine.train_batch(micro_batches(config, mesh, 0)).loss
    mine = sum(own) / len(own) if own else None
    events = [decision_in_trial(value, highest=loss).event for value in (loss, mine) if value is not None]
    return {"mine": mine, "loss": loss.hex(), "events": events}


def decision_in_trial(loss: float, highest: float) -> Decision:
    """Return the decision of a controller in a trial before which no loss was above `highest`."""
    controller = build_controller(
        AdaLRSSettings(mode="paper", window=3, search_start=0.01, search_end=1.0), 1000
    )
    for step in range(100):
        if controller.phase == "trial":
            break
        controller.observe(highest - step / (1 + step))  # falls ever more slowly
    return controller.observe(loss)


TENSOR, PIPE, CONTEXT = (
    f"{name}_size" for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
)


@pytest.mark.parametrize("mesh", [{}, {TENSOR: 4}, {TENSOR: 2, CONTEXT: 2}, {PIPE: 2, TENSOR: 2}], ids=str)
def test_differing_losses_lead_to_one_decision(four_ranks: Ranks, mesh: dict[str, Any]) -> None:
    found = four_ranks.run(decisions_on_losses_that_differ, mesh)
    own = [rank["mine"] for rank in found if rank["mine"] is not None]
    assert len(set(own)) == len(own) > 1, "the ranks' own losses were to differ"
    assert len({event for rank in found for event in rank["events"][1:]}) == 2, "and to split the decision"
    assert len({rank["loss"] for rank in found}) == 1
    assert {rank["events"][0] for rank in found} == {None}


def gathered() -> list[list[float]]:
    mesh = ProcessMesh.from_environment()
    return gather_numbers([0.1 + mesh.rank, 1.0], torch.device("cpu")).tolist()


def test_gathered_numbers_are_the_same_everywhere(two_ranks: Ranks) -> None:
    assert two_ranks.run(gathered) == [[[0.1, 1.0], [1.1, 1.0]]] * 2


def failing_on(rank: int, first_only: bool) -> str:
    mesh = ProcessMesh.from_environment()

    def fail() -> None:
        if mesh.rank == rank:
            raise OSError("disk on fire")

    try:
        (on_first_rank if first_only else on_every_rank)(fail)
    except ValueError as error:
        return str(error)
    return "fine"


def test_an_error_on_one_rank_is_raised_on_all(two_ranks: Ranks) -> None:
    assert two_ranks.run(failing_on, 0, first_only=True) == ["disk on fire"] * 2
    assert two_ranks.run(failing_on, 1, first_only=False) == ["rank 1: disk on fire"] * 2
    assert two_ranks.run(failing_on, 1, first_only=True) == ["fine"] * 2


def die_on_rank_one() -> None:
    if ProcessMesh.from_environment().rank == 1:
        raise KeyError("boom")


def test_test_ranks_report_failures_and_recover() -> None:
    ranks = Ranks(2)
    with pytest.raises(RankFailure, match=r"rank 1:(.|\n)*boom"):
        ranks.run(die_on_rank_one)
    assert ranks.run(failing_on, 5, first_only=True) == ["fine"] * 2
    ranks.close()
