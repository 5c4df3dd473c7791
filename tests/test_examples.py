"""The files of examples/: launch files fit their GPUs, and the task of lm_eval names existing files."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import yaml

from megatron_adalrs.cli.arguments import parse_arguments
from megatron_adalrs.distributed.process_mesh import MeshShape
from megatron_adalrs.planning import plan_run

EXAMPLES = Path(__file__).parent.parent / "examples"
LAUNCH_FILES = sorted(EXAMPLES.glob("qwen2.5-*gpu.yaml"))


@pytest.mark.parametrize("schedule", ["cosine", "WSD"])
@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_a_launch_file_fits_its_gpus(file: Path, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    gpus = int(re.search(r"(\d+)gpu", file.stem)[1])
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    config = parse_arguments(
        ["--config", str(file), "--data-path", "data/corpus", "--lr-decay-style", schedule], True
    )
    mesh = MeshShape.of_world(gpus, **config.parallel.sizes)
    assert config.global_batch_size(mesh.data) == 512
    (stage,) = plan_run(config, config.model.vocab_size, mesh, False).stages
    assert 10e9 < stage.peak < 72e9, "80 GB, with room for the context, fragmentation and NCCL"
    command = re.search(r"^#   (.*)$", file.read_text(), re.MULTILINE)[1]
    assert f"--config examples/{file.name} " in command
    assert config.run.keep_last and config.adalrs.is_on


def test_each_size_has_three_launch_files() -> None:
    assert {file.stem for file in LAUNCH_FILES} == {
        f"qwen2.5-{size}-{gpus}gpu" for size in ("1.5b", "7b") for gpus in (1, 8, 64)
    }


def test_the_lm_eval_task_names_existing_files() -> None:
    """lm_eval itself is not installed for the tests: half a gigabyte."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    path = EXAMPLES / "lm_eval/corpus.yaml"
    task = yaml.load(path.read_text(), Loader)
    module, name = task["custom_dataset"].split(".")
    spec = importlib.util.spec_from_file_location(module, path.with_name(f"{module}.py"))
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    documents = getattr(program, name)
    command = re.search(r"--tasks (\w+) --metadata '{\"(\w+)\":", path.read_text())
    assert (task["task"], task["output_type"]) == (command[1], "loglikelihood_rolling")
    assert command[2] in inspect.signature(documents).parameters
    assert "bits_per_byte" in [entry["metric"] for entry in task["metric_list"]]
    with pytest.raises(ValueError, match="corpus: name a file"):
        documents(pretrained="exported")
    guide = (EXAMPLES.parent / "docs/guide/huggingface.md").read_text()
    assert f"--tasks {task['task']} --metadata" in " ".join(guide.replace("\\\n", " ").split())
