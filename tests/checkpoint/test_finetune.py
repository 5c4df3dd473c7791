"""`--finetune-from` a checkpoint: the new run, its resumption, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adalrs.checkpoint.manifest import sha256, write_manifest
from megatron_adalrs.metrics.run_log import read_run
from tests.checkpoint.test_checkpoint import files_of, refusal, trained, values
from tests.helpers.ranks import Ranks

SEARCH = {"mode": "robust", "max_discarded": 9.0, "restart_steps": 12, "trial_steps": 12, "return_steps": 12}


@pytest.fixture(scope="module")
def source(one_rank: Ranks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 60 steps, with checkpoints at steps 30 and 60."""
    run = tmp_path_factory.mktemp("source") / "run"
    config = values(data, run, train_iters=60, lr=1e-2, save_interval=30, hidden_dropout=0.0)
    assert one_rank.run(trained, config) == [0]
    return run


def start_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])


def test_new_run_starts_from_other_weights(one_rank: Ranks, data: Path, source: Path, tmp_path: Path) -> None:
    assert one_rank.run(trained, values(data, tmp_path / "drawn", seed=9)) == [0]
    for name, place, step in [
        ("newest", source, 60),
        ("chosen", source / "checkpoints" / "iter_0000030", 30),
    ]:
        run = tmp_path / name
        assert one_rank.run(trained, values(data, run, seed=9, finetune_from=str(place))) == [0]
        begun = start_of(run)
        assert (begun["event"], begun["step"], begun["weights_step"]) == ("start", 0, step)
        assert begun["weights_from"] == str(source.resolve() / "checkpoints" / f"iter_{step:07d}")
        assert begun["data_order"] == start_of(tmp_path / "drawn")["data_order"]
        found, drawn = read_run(run).train, read_run(tmp_path / "drawn").train
        assert found.step.tolist() == list(range(1, 26))
        assert found.lr.tolist() == drawn.lr.tolist()
        assert found.loss[0] < drawn.loss[0] - 1, "these are not trained weights"


def test_weights_of_one_rank_load_into_zero_3(
    one_rank: Ranks, two_ranks: Ranks, data: Path, source: Path, tmp_path: Path
) -> None:
    config = values(data, tmp_path / "one", finetune_from=str(source), train_iters=3, hidden_dropout=0.0)
    assert one_rank.run(trained, config) == [0]
    other = config | {"run_dir": str(tmp_path / "two"), "micro_batch_size": 2, "zero_stage": 3}
    assert two_ranks.run(trained, other) == [0, 0]
    expected = read_run(tmp_path / "one").train.loss.tolist()
    assert read_run(tmp_path / "two").train.loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_resumed_run_can_restart_from_initial_weights(
    one_rank: Ranks, data: Path, source: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "source"
    shutil.copytree(source, mine)
    config = values(data, tmp_path / "whole", finetune_from=str(mine), train_iters=200, lr=0.3, adalrs=SEARCH)
    assert one_rank.run(trained, config) == [0]
    job = config | {"run_dir": str(tmp_path / "job"), "auto_resume": True, "exit_interval": 15}
    assert one_rank.run(trained, job) == [143]
    shutil.copytree(mine / "checkpoints" / "iter_0000060", mine / "checkpoints" / "iter_0000090")
    assert one_rank.run(trained, job | {"exit_interval": None}) == [0]
    whole, resumed = read_run(tmp_path / "whole"), read_run(tmp_path / "job")
    assert any(decision.restore == "initial" for decision in resumed.decisions), "it never went back to them"
    assert resumed.train.total_steps.tolist() == whole.train.total_steps.tolist()
    assert resumed.train.loss.tolist() == whole.train.loss.tolist()
    assert resumed.config["finetune_from"] == str(mine.resolve() / "checkpoints" / "iter_0000060")
    # As its own config.yaml has it, and without; but not from another.
    again = job | {"load": str(tmp_path / "job"), "auto_resume": False, "exit_interval": None}
    assert one_rank.run(trained, again | {"finetune_from": resumed.config["finetune_from"]}) == [0]
    shutil.rmtree(mine)  # over, the search needs them no more
    assert one_rank.run(trained, again | {"finetune_from": None}) == [0]
    message = one_rank.run(refusal, again | {"finetune_from": str(source)})[0]
    assert message.startswith(
        f"--finetune-from: {source}: the run that --load or --auto-resume resumes began"
    )
    assert f"with the weights of {mine.resolve()}/checkpoints/iter_0000060; remove the flag" in message


def test_other_initial_weights_are_refused_on_resume(
    one_rank: Ranks, data: Path, source: Path, tmp_path: Path
) -> None:
    config = values(data, tmp_path / "run", train_iters=60, lr=1e-2, hidden_dropout=0.0, load=str(source))
    message = one_rank.run(refusal, config | {"finetune_from": str(source)})[0]
    assert "began with random weights; remove the flag" in message


def test_incompatible_weights_are_refused(one_rank: Ranks, data: Path, source: Path, tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        run = tmp_path / "run"
        message = one_rank.run(refusal, values(data, run, **({"finetune_from": str(source)} | changes)))[0]
        assert message.startswith("--finetune-from: ") and "\n" not in message
        assert not (run / "metrics.jsonl").exists()
        return message

    assert "iter_0000060 has hidden_size 16, this run has 32" in refused(hidden_size=32)
    assert "has num_layers 1, this run has 2" in refused(num_layers=2)
    assert "has vocab_size 50, this run has 64" in refused(vocab_size=64)
    assert "has ffn_hidden_size 64, this run has 80" in refused(ffn_hidden_size=80)
    assert "has max_position_embeddings 16, this run has 8" in refused(seq_length=8)
    assert "has position_embedding_type 'learned_absolute', this run has 'rope'" in refused(
        position_embedding_type="rope"
    )
    assert "has untie_embeddings_and_output_weights False, this run has True" in refused(
        untie_embeddings_and_output_weights=True
    )
    assert f"no checkpoint in {tmp_path}: expected" in refused(finetune_from=str(tmp_path))


def test_damage_is_refused(one_rank: Ranks, data: Path, source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source / "checkpoints" / "iter_0000060", copy)
    file = copy / "engine" / "mp_rank_00_model_states.pt"
    content = file.read_bytes()
    config = values(data, tmp_path / "run", finetune_from=str(copy))

    def refused(**changes: Any) -> str:
        return one_rank.run(refusal, config | changes)[0]

    file.write_bytes(content[:100])
    assert f"--finetune-from: {copy} is damaged: engine/{file.name} has 100 bytes" in refused()
    file.write_bytes(b"x" * len(content))  # as large as it was
    assert f"--finetune-from: cannot read {copy.resolve()}/engine/{file.name}: " in refused()
    assert "is damaged: engine/mp_rank_00_model_states.pt has SHA-256" in refused(verify_checkpoint=True)

    def republish() -> None:
        (copy / "manifest.json").unlink()
        write_manifest(copy, {name: sha256(copy / name) for name in files_of(copy)}, {"step": 60})

    torch.save({"module": {"embedding.tokens.weight": torch.zeros(128, 16)}}, file)
    republish()
    assert f"{copy.resolve()}/engine lacks blocks.0.attention.output.bias, blocks.0." in refused()
    file.unlink()
    (copy / "engine" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(content)
    state = json.loads((copy / "state.json").read_text())
    state["config"]["zero_stage"] = 3
    (copy / "state.json").write_text(json.dumps(state))
    republish()
    assert "has no zero_pp_rank_0_mp_rank_00_optim_states.pt" in refused()
