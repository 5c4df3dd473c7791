"""Rules of the architecture that can be checked: imports point one way, DeepSpeed is imported in one
package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_adalrs"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [  # a package imports from itself and from the lines below it
    {"commands"},
    {"benchmarks", "fault_injection", "reproduction"},
    {"cli"},
    {"training"},
    {"planning", "inference"},
    {"checkpoint"},
    {"integrations"},
    {"analysis"},
    {"snapshot"},
    {"engine"},
    {"huggingface"},
    {"model"},
    {"optim"},
    {"parallel"},
    {"distributed"},
    {"report", "preprocessing"},
    {"data", "metrics", "run_directory"},
    {"config"},
    {"adalrs"},
    {"utils"},
]
TENSORBOARD_WRITERS = ("torch.utils.tensorboard", "tensorboard.summary")


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages_imported(path: Path) -> set[str]:
    own = {name.split(".")[1] for name in imports(path) if name.startswith("megatron_adalrs.")}
    return own - {package_of(path), "__version__"}


def test_no_module_lies_beside_the_packages() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} <= {"__init__.py", "__main__.py"}


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.parent != PACKAGE], ids=lambda f: f"{f.parent.name}/{f.name}"
)
def test_imports_point_one_way(path: Path) -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    here = package_of(path)
    assert here in level, f"{here} has no layer"
    for other in packages_imported(path):
        assert level[other] > level[here], f"{here} imports {other}"


def test_only_the_engine_imports_deepspeed() -> None:
    users = {package_of(f) for f in FILES if any(name.split(".")[0] == "deepspeed" for name in imports(f))}
    assert users == {"engine"}


def test_the_algorithm_does_not_import_torch() -> None:
    users = [
        f.name
        for f in FILES
        if package_of(f) == "adalrs"
        if any(n.split(".")[0] == "torch" for n in imports(f))
    ]
    assert users == []


def test_only_metrics_writes_tensorboard() -> None:
    users = {package_of(f) for f in FILES if any(name.startswith(TENSORBOARD_WRITERS) for name in imports(f))}
    assert users == {"metrics"}


@pytest.mark.parametrize("program", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_a_tool_is_a_thin_wrapper(program: Path) -> None:
    source = program.read_text()
    assert 'if __name__ == "__main__":\n' in source
    assert len(source.splitlines()) <= 15
