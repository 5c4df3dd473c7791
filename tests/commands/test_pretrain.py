"""The pretrain command through a launcher: killed, resumed, and with invalid input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.metrics.run_log import read_run
from megatron_adalrs.training.build import build_trainer
from tests.helpers.programs import unwrapped
from tests.helpers.ranks import Ranks
from tests.helpers.runs import refusal
from tests.helpers.settings import TWO_LAYERS, counting_data

ROOT = Path(__file__).parents[2]
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--max-restarts",
    "1",
    "--monitor-interval",
    "0.5",
    "--master-port",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


def values(data: Path, **changes: Any) -> dict[str, Any]:
    return {
        "preset": "llama-tiny",
        **TWO_LAYERS,
        **counting_data(data),
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": 60,
        "lr": 1e-3,
        "eval_iters": 3,
        "log_interval": 1,
        "adalrs": {"mode": "paper", "window": 6, "search_start": 0.25, "search_end": 0.8},
    } | changes


def launch(
    config: dict[str, Any],
    folder: Path,
    *flags: str,
    program: str = "pretrain_gpt.py",
    launcher: list[str] = DEEPSPEED,
) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return subprocess.Popen(
        [*launcher, str(port), program, "--config", str(file), *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return unwrapped(output)


def kept_losses(run: Path) -> dict[int, float]:
    train = read_run(run).train
    return {
        int(step): float(loss)
        for step, loss in zip(train.step[train.kept], train.loss[train.kept], strict=True)
    }


def verdicts(run: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()]
    return [
        (d["event"], d["step"], d["scale_after"])
        for d in lines
        if d["event"] not in ("window", "interrupted")
    ]


def wait_for(run: Path, event: str, process: subprocess.Popen[str]) -> None:
    """Wait until the decision journal contains an event."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        journal = run / "decisions.jsonl"
        lines = journal.read_text().splitlines() if journal.exists() else []
        if any(event in line for line in lines):
            return
        time.sleep(0.02)
    raise AssertionError(f"no {event} in {run}")


def signal_group(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM to the process group, as schedulers do; the launcher forwards it once more."""
    os.killpg(process.pid, signal.SIGTERM)


def signal_command(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM to the `deepspeed` command alone, which exits without forwarding it."""
    process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(("zero_stage", "terminate"), [(0, signal_group), (3, signal_command)])
def test_a_run_terminated_in_a_trial_resumes_exactly(
    two_ranks: Ranks,
    tmp_path: Path,
    data: Path,
    zero_stage: int,
    terminate: Callable[[subprocess.Popen[str]], None],
) -> None:
    config = values(data, zero_stage=zero_stage, save_interval=10, eval_interval=20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = launch(config, tmp_path / "launched", "--run-dir", str(killed))
    wait_for(killed, "trial_started", process)
    terminate(process)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert read_run(killed).events[-1].event == "interrupted"
    assert (killed / "checkpoints" / "latest").exists()
    output = finished(launch(config, tmp_path / "launched", "--run-dir", str(killed), "--load", str(killed)))
    assert "resumed from" in output
    assert "AdaLRS changed the base learning rate from 0.001 to" in output
    assert two_ranks.run(trained, config | {"run_dir": str(whole)}) == [0, 0]
    assert kept_losses(killed) == kept_losses(whole)
    assert list(kept_losses(whole)) == list(range(1, 61))
    expected, got = verdicts(whole), verdicts(killed)
    assert [v for v in got if v[0] != "trial_started"] == [v for v in expected if v[0] != "trial_started"]
    assert {"accepted", "failed", "neutral", "aborted"} & {event for event, _, _ in expected}
    assert [e.loss for e in read_run(killed).evaluations] == [e.loss for e in read_run(whole).evaluations]


def test_torchrun_restarts_ranks_when_one_dies(two_ranks: Ranks, tmp_path: Path, data: Path) -> None:
    config = values(data, zero_stage=1, save_interval=4, heartbeat_timeout=3)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = launch(config, tmp_path, "--run-dir", str(killed), "--auto-resume", launcher=TORCHRUN)
    wait_for(killed, "trial_started", process)
    ranks = [p for p in psutil.Process(process.pid).children() if "pretrain_gpt.py" in " ".join(p.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    output = finished(process)
    assert "resumed from" in output and "done: 60 steps" in output
    assert two_ranks.run(trained, config | {"run_dir": str(whole)}) == [0, 0]
    assert kept_losses(killed) == kept_losses(whole)


def trained(config: dict[str, Any]) -> int:
    return build_trainer(config_from_values(config)).train()


def test_invalid_runs_are_refused_before_any_write(one_rank: Ranks, tmp_path: Path, data: Path) -> None:
    def refused(**changes: Any) -> str:
        (message,) = one_rank.run(refusal, values(data, **({"run_dir": str(tmp_path / "run")} | changes)))
        assert "\n" not in message
        return message

    assert f"{tmp_path}/nothing.idx" in refused(data_path=str(tmp_path / "nothing"))
    truncated = tmp_path / "truncated"
    for suffix in (".bin", ".idx"):
        Path(f"{truncated}{suffix}").write_bytes(Path(f"{data}{suffix}").read_bytes()[:-8])
    assert "truncated" in refused(data_path=str(truncated))
    foreign = tmp_path / "foreign"
    Path(f"{foreign}.bin").write_bytes(b"0" * 100)
    Path(f"{foreign}.idx").write_bytes(b"not an index at all" * 9)
    assert "foreign.idx" in refused(data_path=str(foreign))
    assert "has 2000 tokens" in refused(seq_length=3000)
    assert "holds token 49: required 0 to 29" in refused(vocab_size=30)
    assert "vocab_size: 50 is below the 257 tokens of the tokenizer" in refused(
        tokenizer_type="ByteTokenizer"
    )
    assert "vocab_size: unknown" in refused(vocab_size=None)
    assert "no checkpoint in" in refused(load=str(tmp_path))
    assert "global_batch_size: 9 is not a multiple" in refused(global_batch_size=9)
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(run_dir=str(tmp_path / "file"))
    assert "split" in refused(split="0,1,1")
    nowhere = values(data)["adalrs"] | {"snapshot_dir": str(tmp_path / "none")}
    assert f"adalrs.snapshot_dir: {tmp_path}/none is not a directory" in refused(adalrs=nowhere)
    assert "already holds metrics.jsonl of another run" in refused(run_dir=str(held(tmp_path / "held")))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["held"]


def held(folder: Path) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    return folder


def test_a_checkpoint_of_another_run_is_refused(one_rank: Ranks, tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    short = {"train_iters": 3, "run_dir": str(run), "adalrs": {"mode": "off"}}
    assert one_rank.run(trained, values(data, **short)) == [0]

    def refused(**changes: Any) -> str:
        other = {"run_dir": str(tmp_path / "other"), "load": str(run)}
        return one_rank.run(refusal, values(data, **(short | other | changes)))[0]

    assert "hidden_size 32, this run has 64" in refused(hidden_size=64)
    assert "bf16 False, this run has True: it must be the same" in refused(bf16=True)
    assert "has eod_mask_loss False, this run has True" in refused(eod_mask_loss=True, eod_token_id=0)
    assert "has global_batch_size 8, this run has 4" in refused(global_batch_size=4)
    assert "is at step 3, and train_iters is 2" in refused(train_iters=2)
    assert "has seed 1234, this run has 7" in refused(seed=7)
    assert "vocab_size 50, this run has 60" in refused(vocab_size=60)
    assert "adalrs.mode" in refused(train_iters=120, adalrs=values(data)["adalrs"])
    assert f"run_dir: {run} already holds a run" in one_rank.run(refusal, values(data, **short))[0]
    assert "accepted" in refused()
    weights = next(run.rglob("mp_rank_00_model_states.pt"))
    weights.write_bytes(weights.read_bytes()[:100])
    assert "mp_rank_00_model_states.pt has 100 bytes" in refused()


def console_output(config: dict[str, Any]) -> str:
    """Train and return the console output."""
    with contextlib.redirect_stdout(io.StringIO()) as console:
        assert trained(config) == 0
    return console.getvalue()


def test_a_search_resumes_on_another_mesh(
    one_rank: Ranks, two_ranks: Ranks, tmp_path: Path, data: Path
) -> None:
    config = values(data, save_interval=20)
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert one_rank.run(trained, config | {"run_dir": str(whole)}) == [0]
    checkpoint = min((whole / "checkpoints").glob("iter_*"))
    step = int(checkpoint.name.removeprefix("iter_"))
    console, _ = two_ranks.run(
        console_output, config | {"run_dir": str(moved), "load": str(checkpoint), "zero_stage": 2}
    )
    told = f"resumed on another mesh: from {checkpoint} at step {step}, written with zero_stage 0"
    assert told in unwrapped(console)
    expected, found = kept_losses(whole), kept_losses(moved)
    assert list(found) == list(range(step + 1, 61))
    assert list(found.values()) == pytest.approx([expected[step] for step in found], rel=1e-5)
    assert verdicts(moved) and verdicts(moved) == verdicts(whole)[-len(verdicts(moved)) :]


def test_an_error_is_printed_once_with_exit_code_2(tmp_path: Path, data: Path) -> None:
    mistakes = {
        "hidden_size: 33": ["--hidden-size", "33"],
        "nothing.idx": ["--data-path", str(tmp_path / "nothing")],
        "= 4: 2 = 0 x 4 + 2": ["--num-query-groups", "4", "--tensor-model-parallel-size", "4"],
    }
    processes = {
        message: launch(values(data), tmp_path / str(place), "--run-dir", str(tmp_path / "run"), *flags)
        for place, (message, flags) in enumerate(mistakes.items())
    }
    for message, process in processes.items():
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 2, output
        assert output.count("error: ") == 1
        assert "Traceback" not in output
        assert message in output


RANKS_THAT_DIFFER = """
import os, sys
from megatron_adalrs.training.trainer import Trainer

healthy_step = Trainer.step

def step(self, stop=False):
    result = healthy_step(self, stop)
    if self.state.step == 4 and os.environ["RANK"] == "1":
        self.controller.scale, self.state.consumed_samples = 2.0, 7
    return result

Trainer.step = step
import pretrain_gpt
sys.exit(pretrain_gpt.main())
"""


def test_ranks_that_differ_stop_with_exit_code_3(tmp_path: Path, data: Path) -> None:
    program = tmp_path / "ranks_that_differ.py"
    program.write_text(RANKS_THAT_DIFFER)
    flags = ["--run-dir", str(tmp_path / "run"), "--check-ranks-every", "3"]
    process = launch(values(data), tmp_path, *flags, program=str(program))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 3, output
    assert output.count("error: ranks differ in consumed_samples (rank 0: 48, rank 1: ") == 1
    assert "; scale (rank 0: 1.0, rank 1: 2.0); controller.scale (rank 0: 1.0, rank 1: 2.0)" in output
    assert "stopped at step 6" in output
    assert "Traceback" not in output
    assert read_run(tmp_path / "run").events[-1].event == "ranks_differ"
