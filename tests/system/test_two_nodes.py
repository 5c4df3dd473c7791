"""`deepspeed --hostfile` on two nodes: a complete run, a broken link, a node that dies."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.metrics.run_log import read_run
from megatron_adalrs.training.build import build_trainer
from tests.helpers.ranks import Ranks
from tests.helpers.settings import ONE_LAYER, counting_data
from tests.system.cluster import Cluster, NoNodes, two_nodes, wait_until

pytestmark = pytest.mark.system

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 5
"""Seconds of --heartbeat-timeout."""
BOUND = 120
"""Seconds within which the ranks must exit: TIMEOUT, the timeout of ssh, and reserve for a slow machine."""
STEPS = 120


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        with two_nodes(tmp_path_factory.mktemp("cluster")) as cluster:
            yield cluster
    except NoNodes as reason:
        pytest.skip(str(reason))


def values(data: Path, run_dir: Path) -> dict[str, Any]:
    """Return a configuration whose steps have many micro-batches, so that a fault can come between them."""
    return {
        "preset": "llama-tiny",
        **ONE_LAYER,
        **counting_data(data),
        "micro_batch_size": 1,
        "global_batch_size": 16,
        "train_iters": STEPS,
        "lr": 1e-3,
        "log_interval": 1,
        "save_interval": 10,
        "keep_last": 2,
        "heartbeat_timeout": TIMEOUT,
        "run_dir": run_dir,
    }


def trained(config: dict[str, Any]) -> int:
    return build_trainer(config_from_values(config)).train()


@pytest.fixture(scope="module")
def expected(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[int, float]:
    """Return the losses of an uninterrupted run of two ranks on one host."""
    run = tmp_path_factory.mktemp("one_host") / "run"
    assert two_ranks.run(trained, values(data, run)) == [0, 0]
    return losses(run)


def losses(run: Path) -> dict[int, float]:
    train = read_run(run).train
    return {
        int(step): float(loss)
        for step, loss in zip(train.step[train.kept], train.loss[train.kept], strict=True)
    }


# The steps are short, so that the last heartbeat may be from before the first step.
FAR_IS_LOST = (
    r"error: rank 0 on node-a exits at step \d+: .*rank 1 on node-b \(process \d+, (step \d+|not "
    r"training yet)"
)


class Job:
    """A run on the cluster; the output of each rank is in a file of its own."""

    def __init__(self, cluster: Cluster, data: Path, folder: Path) -> None:
        self.cluster, self.data, self.folder = cluster, data, folder
        self.run_dir = folder / "run"
        self.launches = 0

    def launch(self, *flags: str) -> subprocess.Popen[str]:
        self.launches += 1
        environment = {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        if "TORCH_EXTENSIONS_DIR" in os.environ:
            environment["TORCH_EXTENSIONS_DIR"] = os.environ["TORCH_EXTENSIONS_DIR"]
        settings = values(self.data, self.run_dir).items()
        arguments = [text for name, value in settings for text in (f"--{name.replace('_', '-')}", str(value))]
        logs = ["--enable_each_rank_log", str(self.logs())]
        return self.cluster.launch(ROOT, environment, *logs, "pretrain_gpt.py", *arguments, *flags)

    def logs(self) -> Path:
        return self.folder / f"logs{self.launches}"

    def output(self, rank: int) -> str:
        """Return the output of a rank of the last launch."""
        return "".join(file.read_text() for file in self.logs().glob(f"*_rank{rank}.log"))

    def everything(self) -> str:
        return "\n".join([self.cluster.output(), self.output(0), self.output(1)])

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Wait until a launch has succeeded and return the output of the first rank."""
        assert process.wait(300) == 0, self.everything()
        return self.output(0)

    def reach(self, steps: int, process: subprocess.Popen[str]) -> None:
        """Wait until metrics.jsonl has the records of so many steps."""
        file = self.run_dir / "metrics.jsonl"

        def reached() -> bool:
            assert process.poll() is None, self.everything()
            return file.exists() and file.read_text().count('"train"') >= steps

        wait_until(reached, f"{steps} steps")

    def wait_for_the_end_of(self, rank: int) -> float:
        """Wait until no process of the node runs the program and return the seconds that it took."""
        node = self.cluster.nodes[rank]
        return wait_until(
            lambda: not any(is_training(pid) for pid in node.processes()), f"the end of rank {rank}"
        )


@pytest.fixture
def job(cluster: Cluster, data: Path, tmp_path: Path) -> Job:
    return Job(cluster, data, tmp_path)


def is_training(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"pretrain_gpt.py" in command and b"deepspeed.launcher.launch" not in command


def test_deepspeed_trains_across_two_nodes(job: Job, expected: dict[int, float]) -> None:
    job.finish(job.launch())
    assert losses(job.run_dir) == expected
    assert list(expected) == list(range(1, STEPS + 1))


def test_both_nodes_exit_when_the_link_breaks(job: Job, expected: dict[int, float]) -> None:
    process = job.launch()
    job.reach(25, process)
    far = job.cluster.nodes[1]
    far.set_link("down")
    try:
        assert max(job.wait_for_the_end_of(rank) for rank in (0, 1)) < BOUND
        assert process.wait(BOUND) != 0
    finally:
        far.set_link("up")
    assert re.search(FAR_IS_LOST, job.output(0)), job.everything()
    # If the link broke before its first look at rank 0's heartbeat, it does not know the host of rank 0.
    message = (
        r"error: rank 1 on node-b exits at step \d+: rank 0( on node-a .*)?, its host .* the store at "
        r"10.73.0.1:"
    )
    assert re.search(message, job.output(1)), job.everything()
    assert "Traceback" not in job.output(0) + job.output(1)
    assert "resumed from" in job.finish(job.launch("--auto-resume"))
    assert losses(job.run_dir) == expected


def test_the_other_node_exits_when_one_is_killed(job: Job, expected: dict[int, float]) -> None:
    """The second node is killed first; in the resumed run it is the node with the store and the launcher."""
    first, far = job.cluster.nodes
    process = job.launch()
    job.reach(25, process)
    far.kill()
    assert process.wait(BOUND) != 0
    far.boot()
    assert re.search(FAR_IS_LOST, job.output(0)), job.everything()

    process = job.launch("--auto-resume")
    job.reach(70, process)
    first.kill()
    process.wait()
    assert job.wait_for_the_end_of(1) < BOUND
    first.boot()
    assert re.search(r"error: rank 1 on node-b exits at step \d+: .*rank 0", job.output(1)), job.everything()

    assert "Traceback" not in job.output(0) + job.output(1)
    assert "resumed from" in job.finish(job.launch("--auto-resume"))
    assert losses(job.run_dir) == expected
