"""The launch files of examples/: what they say can be run on what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_adalrs.arguments import parse_arguments
from megatron_adalrs.parallel.topology import GridShape
from megatron_adalrs.plan import plan_run

EXAMPLES = Path(__file__).parent.parent / "examples"
LAUNCH_FILES = sorted(EXAMPLES.glob("qwen2.5-*gpu.yaml"))


@pytest.mark.parametrize("schedule", ["cosine", "WSD"])
@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_a_launch_file_fits_its_gpus(file: Path, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    gpus = int(re.search(r"(\d+)gpu", file.stem)[1])
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    config = parse_arguments(["--config", str(file), "--data-path", "data/corpus", "--lr-decay-style", schedule], True)
    grid = GridShape.of_world(gpus, **config.parallel.sizes)
    assert config.global_batch_size(grid.data) == 512
    (stage,) = plan_run(config, config.model.vocab_size, grid, False).stages
    assert 10e9 < stage.peak < 72e9, "80 GB, with room for the context, fragmentation and NCCL"
    command = re.search(r"^#   (.*)$", file.read_text(), re.MULTILINE)[1]
    assert f"--config examples/{file.name} " in command
    assert config.run.keep_last and config.adalrs.enabled


def test_there_is_one_for_every_size_and_number() -> None:
    assert {file.stem for file in LAUNCH_FILES} == {
        f"qwen2.5-{size}-{gpus}gpu" for size in ("1.5b", "7b") for gpus in (1, 8, 64)
    }
