"""The built wheel, installed without the repository: programs, files and imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from megatron_adalrs.commands import COMMANDS
from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder
from megatron_adalrs.distributed.local_ranks import free_port

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, since setuptools writes into the folder it builds from."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_adalrs", source / "megatron_adalrs", ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    output = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(output), str(source)], check=True)
    (found,) = output.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a new environment that sees this one's dependencies, but not its `.pth` files.

    An editable install of the repository is such a file, so that the package can only come from the wheel.

    Returns:
        The environment's folder of programs.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(
        subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    )
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    # A PYTHONPATH with this checkout would make pip believe that the package is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*install, "--no-index", str(wheel)], check=True, env=environment)
    return folder / "bin"


def call(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program outside the repository and without its PYTHONPATH."""
    environment = {"PATH": "/usr/bin:/bin", "DS_ACCELERATOR": "cpu", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment)


def test_the_wheel_contains_every_file(wheel: Path) -> None:
    tracked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "megatron_adalrs").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("megatron_adalrs/")}
    assert packed == tracked
    assert "megatron_adalrs/py.typed" in packed


def test_the_package_comes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    done = call(installed / "python", "-c", "import megatron_adalrs as m; print(m.__file__)", cwd=tmp_path)
    assert Path(done.stdout.strip()).is_relative_to(installed.parent), done


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(installed: Path, tmp_path: Path, name: str) -> None:
    done = call(installed / "megatron-adalrs", name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"usage: megatron-adalrs {name}" in done.stdout


def test_the_module_is_the_program(installed: Path, tmp_path: Path) -> None:
    program = call(installed / "megatron-adalrs", "--help", cwd=tmp_path)
    module = call(installed / "python", "-m", "megatron_adalrs", "--help", cwd=tmp_path)
    assert program.stdout == module.stdout
    assert all(f"  {name} " in program.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrian",), "error: pretrian: no such command; did you mean pretrain?"),
        (("nonsense",), "error: nonsense: no such command; megatron-adalrs --help lists the commands"),
        ((), "usage: megatron-adalrs COMMAND"),
    ],
)
def test_an_unknown_command_exits_with_2(
    installed: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = call(installed / "megatron-adalrs", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message)


TINY = (
    "--preset gpt2-tiny --num-layers 1 --seq-length 16 --data-path corpus --split 100,0,0 "
    "--micro-batch-size 2 --train-iters 4 --lr 1e-3 --adalrs.mode off --run-dir run"
)


def test_train_and_report_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "' + "to be or not to be " * 200 + '"}\n')
    steps = [
        "preprocess --input text.jsonl --output-prefix corpus --tokenizer-type ByteTokenizer",
        "check-data corpus",
        f"pretrain {TINY}",
        "report run --output report.html",
    ]
    for arguments in steps:
        done = call(installed / "megatron-adalrs", *arguments.split(), cwd=tmp_path)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    assert "<html" in (tmp_path / "report.html").read_text()


def test_the_plug_in_needs_no_deepspeed(installed: Path, tmp_path: Path) -> None:
    code = (
        "from megatron_adalrs import AdaLRS; import sys;"
        "assert AdaLRS.__name__ == 'AdaLRS';"
        "print([name for name in ('deepspeed', 'pydantic', 'tyro') if name in sys.modules])"
    )
    done = call(installed / "python", "-c", code, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


def test_deepspeed_starts_the_module(installed: Path, tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "corpus", np.uint16) as builder:
        builder.add_document([1, 2, 3] * 100)
        builder.finalize()
    launch = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "1", "--master_port", str(free_port())]
    module = ["--module", "megatron_adalrs.commands.pretrain", *TINY.split(), "--vocab-size", "8"]
    done = call(installed / "python", *launch, *module, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "done: 4 steps" in done.stdout


@pytest.mark.parametrize("arguments", ["--help", "pretrain --help", "report --help"])
def test_a_closed_pipe_is_no_error(installed: Path, tmp_path: Path, arguments: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = [installed / "megatron-adalrs", *arguments.split()]
    done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
