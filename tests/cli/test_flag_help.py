"""`--help` of pretraining: one group of flags for each group of the configuration."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.cli.arguments import parse_arguments
from megatron_adalrs.config import NESTED, Config
from megatron_adalrs.config.loss_guard import LossGuardConfig


@pytest.fixture
def groups(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the text of each group of flags by its title, in the order of the help."""
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help"])
    assert end.value.code == 0
    boxes = re.split(r"^ (\S+) options *\n -+ *\n", capsys.readouterr().out, flags=re.MULTILINE)
    return dict(zip(boxes[1::2], boxes[2::2], strict=True))


def entry(group: str, flag: str) -> str:
    """Return the line of a flag and its text, with single spaces."""
    lines = [line.strip() for line in group.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.split(",")[0].split(" ")[0] == flag)
    following = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("--")), len(lines))
    return " ".join(" ".join(lines[start:following]).split())


def test_one_group_per_section_in_order(groups: dict[str, str]) -> None:
    assert list(groups) == [name.replace("_", "-") for name in Config.model_fields]


def test_every_field_is_in_its_group_in_order(groups: dict[str, str]) -> None:
    for name, section in Config.model_fields.items():
        if name == "adalrs":
            fields = [field.name for field in dataclasses.fields(AdaLRSSettings)]
        else:
            fields = list((LossGuardConfig if name == "loss_guard" else section.annotation).model_fields)
        prefix = f"{name}." if name in NESTED else ""
        flags = re.findall(r"^  --(?!no-)(\S+?)[, ]", groups[name.replace("_", "-")], re.MULTILINE)
        assert flags == [f"{prefix}{field}".replace("_", "-") for field in fields]


def test_choices_are_in_the_declared_order(groups: dict[str, str]) -> None:
    assert "{constant,linear,cosine,inverse-square-root,WSD}" in groups["optimizer"]
    assert "{off,skip,rewind,stop}" in groups["loss-guard"]
    assert "--preset {gpt2-tiny,gpt2,gpt2-medium,gpt2-large," in groups["model"]


def test_placeholders_are_short(groups: dict[str, str]) -> None:
    text = "\n".join(groups.values())
    assert "None}" not in text and "{[" not in text
    assert entry(groups["data"], "--data-path").startswith("--data-path [SIZE] PREFIX ... ")
    assert entry(groups["run"], "--save-interval").startswith("--save-interval INT ")


def test_defaults_are_shown_the_same_way(groups: dict[str, str]) -> None:
    assert entry(groups["training"], "--seed").endswith("(default: 1234)")
    assert entry(groups["data"], "--split").endswith("(default: 969,30,1)")
    assert entry(groups["run"], "--load").endswith("(optional)")
    assert entry(groups["optimizer"], "--lr").endswith("(required)")
    assert "Default: " not in "\n".join(groups.values())
