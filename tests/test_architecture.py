"""The house rules that a machine can check: imports point one way, deepspeed stays in its room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megatron_adalrs"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [  # a module imports only from its own line and the lines below
    {"dry_run"},
    {"build"},
    {"trainer"},
    {"evaluation", "vocabulary"},
    {"saver"},
    {"plan"},
    {"past"},
    {"inference"},
    {"checkpoint", "snapshot", "rank_check"},
    {"engine"},
    {"huggingface"},
    {"model", "optim", "deepspeed_config"},
    {
        "parallel",
        "schedule",
        "summary",
        "bad_numbers",
        "train_state",
        "metrics",
        "random_state",
        "stop_signal",
        "heartbeat",
        "launch_environment",
        "data",
        "report",
        "loss_log",
        "run_log",
        "run_records",
        "live_memory",
    },
    {"arguments"},
    {"config"},
    {"adalrs"},
]
WRITERS = ("torch.utils.tensorboard", "tensorboard.summary")
CONFIG_ONLY = {"data", "metrics", "schedule", "optim"}
EXCEPTIONS = {("arguments", "model"), ("arguments", "huggingface")}  # presets and config.json are plain mappings


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    own = {name.split(".")[1] for name in imports(path) if name.startswith("megatron_adalrs.")}
    return own - {room(path), "__version__"}


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != PACKAGE or f.stem != "__init__"], ids=str)
def test_imports_point_one_way(path: Path) -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    here = room(path)
    assert here in level, f"{here} has no place in the layers"
    for other in rooms_imported(path):
        assert level[other] >= level[here] or (here, other) in EXCEPTIONS, f"{here} imports {other}"
        if here in CONFIG_ONLY:
            assert other == "config", f"{here} may import config only"


def test_deepspeed_is_imported_by_the_engine_only() -> None:
    users = {room(f) for f in FILES if any(name.split(".")[0] == "deepspeed" for name in imports(f))}
    assert users == {"engine"}


def test_tensorboard_is_written_by_metrics_only() -> None:
    users = {room(f) for f in FILES if any(name.startswith(WRITERS) for name in imports(f))}
    assert users == {"metrics"}


@pytest.mark.parametrize("program", sorted((PACKAGE.parent / "tools").glob("*.py")), ids=lambda path: path.name)
def test_a_tool_is_a_program(program: Path) -> None:
    assert 'if __name__ == "__main__":\n' in program.read_text()
