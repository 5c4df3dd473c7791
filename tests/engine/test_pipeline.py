"""A pipeline gives the results of one rank: losses, gradient norms, evaluation, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint
from tests.helpers.ranks import Ranks
from tests.helpers.runs import VOCABULARY, micro_batches, start, tiny_config

GPT2 = {"preset": "gpt2-tiny", "num_layers": 4, "lr": 3e-3, "global_batch_size": 16, "clip_grad": 1.1}
LLAMA = GPT2 | {"preset": "llama-tiny", "untie_embeddings_and_output_weights": True, "num_query_groups": 2}


def padding(values: dict[str, Any]) -> list[float]:
    """Return the largest element in the padding rows of each vocabulary table of this stage after steps."""
    config, mesh, engine = start(values)
    for step in range(3):
        engine.train_batch(micro_batches(config, mesh, step))
    rows = config.model.padded_vocab_size(VOCABULARY)
    tables = [parameter for parameter in engine.module.parameters() if parameter.shape[0] == rows]
    return [float(table[VOCABULARY:].detach().abs().max()) for table in tables]


@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["tied", "untied"])
def test_padding_rows_stay_zero_on_both_stages(two_ranks: Ranks, shape: dict[str, Any]) -> None:
    # A width at which no other matrix has as many rows as the padded vocabulary.
    values = shape | {"pipeline_model_parallel_size": 2, "ffn_hidden_size": 48}
    assert two_ranks.run(padding, values) == [[0.0], [0.0]]


def losses_of_other_shapes(values: dict[str, Any]) -> list[float]:
    """Return evaluations, between training steps, with micro-batches smaller than those of training."""
    config, mesh, engine = start(values)
    small = [batch[:1, :9] for batch in micro_batches(config, mesh, 7)]
    losses = [engine.train_batch(micro_batches(config, mesh, 0)).loss, engine.evaluate(iter([small]))]
    return [*losses, engine.train_batch(micro_batches(config, mesh, 1)).loss]


def test_micro_batches_may_change_their_shape(one_rank: Ranks, two_ranks: Ranks) -> None:
    (expected,) = one_rank.run(losses_of_other_shapes, GPT2)
    for found in two_ranks.run(losses_of_other_shapes, GPT2 | {"pipeline_model_parallel_size": 2}):
        assert found == pytest.approx(expected, rel=1e-5)


def resumed_losses(values: dict[str, Any], folder: Path) -> tuple[list[float], list[float]]:
    """Return losses after a checkpoint: of the run that wrote it, and of one that loads it."""
    config, mesh, engine = start(values)
    for step in range(3):
        engine.train_batch(micro_batches(config, mesh, step))
    checkpoint = save_checkpoint(engine, mesh, CheckpointFolder(folder), 3, {"config": config.to_flat()})
    expected = [engine.train_batch(micro_batches(config, mesh, step)).loss for step in range(3, 8)]
    config, mesh, engine = start(values | {"seed": 7})
    load_checkpoint(engine, mesh, checkpoint)
    return expected, [engine.train_batch(micro_batches(config, mesh, step)).loss for step in range(3, 8)]


@pytest.mark.parametrize("precision", [{}, {"zero_stage": 1}, {"zero_stage": 1, "bf16": True}], ids=str)
def test_a_checkpoint_resumes_to_the_same_losses(
    two_ranks: Ranks, tmp_path: Path, precision: dict[str, Any]
) -> None:
    values = GPT2 | {"pipeline_model_parallel_size": 2, "hidden_dropout": 0.1} | precision
    for expected, found in two_ranks.run(resumed_losses, values, tmp_path):
        assert found == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pipeline_model_parallel_size": 8}, "pipeline_model_parallel_size: 8 .*num_layers is 4"),
        (
            {"pipeline_model_parallel_size": 2, "zero_stage": 2},
            "zero_stage: 2 .*pipeline_model_parallel_size 2",
        ),
        (
            {"pipeline_model_parallel_size": 2, "zero_stage": 3},
            "zero_stage: 3 .*pipeline_model_parallel_size 2",
        ),
        ({"pipeline_model_parallel_size": 2, "bf16": True}, "zero_stage: 0 with bf16 .*use --zero-stage 1"),
        ({"pipeline_partition": "by hand"}, "pipeline_partition: 'by hand'"),
        (
            {"pipeline_model_parallel_size": 2, "context_parallel_size": 2},
            "context_parallel_size: 2 cannot be combined with pipeline_model_parallel_size 2: ",
        ),
    ],
    ids=str,
)
def test_an_impossible_pipeline_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**GPT2 | values)
