"""The experiments on a cluster: configurations, a launch script, and the collection of the results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.data.pair_files import idx_path
from megatron_adalrs.reproduction import results
from megatron_adalrs.reproduction.plan import SCHEDULES, Run, run_name
from megatron_adalrs.reproduction.results import Result
from megatron_adalrs.utils.atomic_files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("fixed", "paper", "robust")


@dataclass(frozen=True)
class ClusterScale:
    """A published model that is trained on the user's data set."""

    name: str
    preset: str
    micro_batch_size: int
    zero_stage: int = 1
    recompute_granularity: str | None = None
    train_iters: int = 50_000
    """Number of steps. The default window is 1250 steps then, within the 1000 to 2500 of the paper."""
    global_batch_size: int = 512
    seq_length: int = 4096
    rates: tuple[float, ...] = (2e-5, 2e-4, 2e-3)
    """Initial rates: one too small, one about right, one too large."""
    schedules: tuple[str, ...] = SCHEDULES


CLUSTER_SCALES = {
    "1.5b": ClusterScale("1.5b", "qwen2.5-1.5b", 4),
    "7b": ClusterScale("7b", "qwen2.5-7b", 1, recompute_granularity="full"),
}


def cluster_runs(scale: ClusterScale, seeds: Sequence[int]) -> list[Run]:
    """Return the runs of every method from every rate."""
    places = [
        (schedule, method, lr) for schedule in scale.schedules for method in METHODS for lr in scale.rates
    ]
    return [
        Run(scale.preset, schedule, method, lr, seed) for schedule, method, lr in places for seed in seeds
    ]


def cluster_values(run: Run, scale: ClusterScale, data_path: str) -> dict[str, Any]:
    """Return the configuration of a run without its directory.

    Raises:
        ValueError: The configuration is not valid.
    """
    values = {
        "preset": scale.preset,
        "seq_length": scale.seq_length,
        "data_path": data_path,
        "bf16": True,
        "train_iters": scale.train_iters,
        "micro_batch_size": scale.micro_batch_size,
        "global_batch_size": scale.global_batch_size,
        "zero_stage": scale.zero_stage,
        "seed": run.seed,
        "recompute_granularity": scale.recompute_granularity,
        "lr": run.lr,
        "min_lr": 0.1 * run.lr,
        "lr_decay_style": run.schedule,
        "lr_warmup_iters": round(0.03 * scale.train_iters),
        "eval_interval": scale.train_iters // 20,
        "save_interval": scale.train_iters // 50,
        "adalrs": {"mode": "off" if run.method == "fixed" else run.method},
    }
    values = {name: value for name, value in values.items() if value is not None}
    config_from_values(values)
    return values


def write_launch(output: Path, scale: ClusterScale, seeds: Sequence[int], data_path: str) -> Path:
    """Write configs/NAME.yaml for each run, runs.json for `collect_cluster`, and launch.sh.

    Returns:
        Path of launch.sh.

    Raises:
        ValueError: There is no such data set, or a configuration is not valid.
        OSError: A file cannot be written.
    """
    prefix = Path(data_path).resolve()
    if not idx_path(prefix).exists():
        raise ValueError(
            f"--data-path: {data_path}: there is no {idx_path(prefix)}; write it with `megatron-adalrs "
            "preprocess`"
        )
    output = output.resolve()
    planned, lines = [], []
    for run in cluster_runs(scale, seeds):
        values = cluster_values(run, scale, str(prefix))
        name = run_name(run, values)
        with atomic_write(output / "configs" / f"{name}.yaml") as stream:
            stream.write(yaml.safe_dump(values, sort_keys=False).encode())
        command = [
            "deepspeed",
            "--module",
            "megatron_adalrs.commands.pretrain",
            "--config",
            str(output / "configs" / f"{name}.yaml"),
        ]
        command += ["--run-dir", str(output / "runs" / name)]
        planned.append({"name": name, "run": asdict(run), "command": shlex.join(command)})
        lines.append(f"train {shlex.quote(name)}")
    with atomic_write(output / "runs.json") as stream:
        stream.write(json.dumps(planned, indent=1).encode())
    script = output / "launch.sh"
    with atomic_write(script) as stream:
        stream.write(_SCRIPT.format(output=shlex.quote(str(output)), root=shlex.quote(str(ROOT))).encode())
        stream.write("\n".join([*lines, ""]).encode())
    script.chmod(0o755)
    return script


def collect_cluster(output: Path) -> tuple[list[Result], list[str]]:
    """Return the results of the complete runs, and the names of those that are not complete.

    Raises:
        ValueError: The folder has no planned runs, or the records of a run are damaged.
        OSError: The records of a run cannot be read.
    """
    file = output / "runs.json"
    if not file.exists():
        raise ValueError(
            f"--output: {output} has no runs.json: first write the launch script, without --collect"
        )
    complete, missing = [], []
    for planned in json.loads(file.read_bytes()):
        folder = output / "runs" / planned["name"]
        if results.is_complete(folder):
            settings = tuple((name, value) for name, value in planned["run"]["settings"])
            run = Run(**planned["run"] | {"settings": settings})
            complete.append(results.collect(run, folder, planned["command"]))
        else:
            missing.append(planned["name"])
    return complete, missing


_SCRIPT = """\
#!/usr/bin/env bash
# Train every run that is not complete, one after the other. After an interruption, run the script again.
#   HOSTFILE=hosts ./launch.sh     # on many nodes; one line per node, such as `worker-1 slots=8`
# The lines at the end can be split between several machines that share this folder.
set -uo pipefail
cd {root}
output={output}

train() {{
    local run="$output/runs/$1" resume=()
    if grep -qs '"event": "end"' "$run/metrics.jsonl"; then
        echo "$1 is complete"
        return
    fi
    if [ -e "$run/checkpoints/latest" ]; then
        resume=(--load "$run")
    elif [ -e "$run" ]; then
        rm -r "$run"
    fi
    deepspeed ${{HOSTFILE:+--hostfile "$HOSTFILE"}} --module megatron_adalrs.commands.pretrain \\
        --config "$output/configs/$1.yaml" --run-dir "$run" "${{resume[@]}}" || echo "$1 failed" >&2
}}

"""
