"""Commands and examples in README.md, CONTRIBUTING.md and docs/ work.

A block of bash is executed, in the order of the page and in a folder of its own, unless the line before it is
`<!-- not run -->`. The flags of every command of this package are parsed with its real parser in both cases.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from megatron_adalrs.cli.arguments import config_from_values, parse_arguments
from megatron_adalrs.cli.program import parse_flags
from megatron_adalrs.commands import COMMANDS
from megatron_adalrs.commands.reproduce import parse as parse_reproduce

ROOT = Path(__file__).parents[2]
PAGES = [path for name in ("README.md", "CONTRIBUTING.md") if (path := ROOT / name).exists()]
PAGES += sorted((ROOT / "docs").rglob("*.md"), key=lambda path: (path.name != "tutorial.md", path))
BLOCK = re.compile(r"(<!-- not run -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS_OF = {"replay": lambda module: module._flags({}), "simulate": lambda module: module._flags()}


class Block(NamedTuple):
    """A block of code on a page."""

    page: str
    language: str
    is_run: bool
    text: str

    def commands(self) -> list[list[str]]:
        """Return the commands of a bash block, in words and without redirections."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line.split(" > ")[0], comments=True) for line in lines]
        return [command for command in words if command]


def blocks(language: str) -> Iterator[Block]:
    for path in PAGES:
        for marked, found, text in BLOCK.findall(path.read_text()):
            if found == language:
                yield Block(str(path.relative_to(ROOT)), found, not marked, text)


def own_command(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the name and the flags of a command of this package, or None for another program."""
    if words[0] == "megatron-adalrs":
        return words[1], list(words[2:])
    for index, word in enumerate(words):
        if word.endswith(("pretrain_gpt.py", "megatron_adalrs.commands.pretrain")):
            return "pretrain", list(words[index + 1 :])
    return None


def parser_of(name: str) -> Callable[[list[str]], Any]:
    """Return the function that parses the flags of a command."""
    if name == "pretrain":
        return parse_arguments
    if name == "reproduce":
        return parse_reproduce
    module = importlib.import_module(f"megatron_adalrs.commands.{COMMANDS[name].module}")
    kind = FLAGS_OF[name](module) if name in FLAGS_OF else module.Arguments
    return functools.partial(parse_flags, kind, None)


OWN = sorted(
    {shlex.join(words) for block in blocks("bash") for words in block.commands() if own_command(words)}
)


@pytest.fixture
def files_of_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder with the files that the examples name."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "examples" / "quickstart.yaml", tmp_path / "run.yaml")
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64}
    run = shape | {"position_embedding_type": "rope", "data_path": "d", "train_iters": 400, "lr": 1e-3}
    for folder in ("Qwen2.5-1.5B", "runs/search"):  # the first stands for a folder of Hugging Face
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", OWN)
@pytest.mark.usefixtures("files_of_examples")
def test_flags_are_parsed(line: str) -> None:
    found = own_command(shlex.split(line))
    assert found is not None
    name, flags = found
    try:
        parser_of(name)(flags)
    except SystemExit as ended:  # after --help or a completion script
        assert not ended.code


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_parser(name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parser_of(name)(["--no-such-flag-exists"])
    assert ended.value.code == 2


def test_a_block_that_is_run_has_own_commands_only() -> None:
    others = [
        (block.page, words)
        for block in blocks("bash")
        if block.is_run
        for words in block.commands()
        if own_command(words) is None
    ]
    assert others == []


def test_blocks_that_are_run_succeed(tmp_path: Path) -> None:
    (tmp_path / "pretrain_gpt.py").symlink_to(ROOT / "pretrain_gpt.py")
    program = f'megatron-adalrs() {{ {shlex.quote(sys.executable)} -m megatron_adalrs "$@"; }}\n'
    search_path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "PATH": search_path}
    run = [block for block in blocks("bash") if block.is_run]
    assert len(run) >= 10
    for block in run:
        command = ["bash", "-euc", program + block.text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (
            f"{block.page}:\n{block.text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def test_configuration_files_are_read() -> None:
    read = [config_from_values(yaml.safe_load(block.text)) for block in blocks("yaml")]
    assert read


class Loader:
    """Batches with a position that can be saved."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.position += 1
            yield torch.full((4, 8), float(self.position % 7))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.mark.parametrize("block", [b for b in blocks("python")], ids=lambda block: block.page)
def test_the_plug_in_example_runs(block: Block) -> None:
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train_step(batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(batch) - 1).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    names = {"model": model, "optimizer": optimizer, "loader": Loader(), "train_step": train_step}
    exec(block.text.replace("10_000", "400"), names)
    assert names["adalrs"].finished  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", [path for path in PAGES if path.parent == ROOT], ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", path.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_named_files_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    paths = re.findall(r"`(?:megatron_adalrs/)?((?:[a-z_]+/)+[a-z_]+\.(?:py|sh|md))`", text)
    assert paths
    assert [
        path for path in paths if not any((ROOT / start / path).exists() for start in ("", "megatron_adalrs"))
    ] == []
