"""The documentation builds without a network and without a warning."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_adalrs.cli.arguments import GROUPS, NESTED_FIELDS

ROOT = Path(__file__).parents[2]
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the documentation once, and return the folder of its pages."""
    folder = tmp_path_factory.mktemp("docs") / "html"
    done = subprocess.run(
        [ROOT / "docs" / "build.sh", folder], capture_output=True, text=True, env=os.environ | NO_NETWORK
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")} >= sources


def test_every_flag_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "flags.html").read_text()
    names = [name for group in GROUPS.values() for name in group.model_fields]
    names += [f"{group}.{name}" for group, fields in NESTED_FIELDS.items() for name in fields]
    missing = [name for name in names if f"--{name.replace('_', '-')}" not in page]
    assert missing == []


def test_no_placeholder_is_left(site: Path) -> None:
    assert [page.name for page in site.rglob("*.html") if "<!-- table:" in page.read_text()] == []


def megatron_flags(title: str) -> list[str]:
    """Return the flags in a section of the table for users of Megatron-LM."""
    page = (ROOT / "docs" / "reference" / "megatron.md").read_text()
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    cells = [
        line.split("|")[1 if title == "Not available" else 2] for line in section.splitlines() if "|" in line
    ]
    return re.findall(r"`--([\w-]+)`", "".join(cells))


def test_flags_called_the_same_exist() -> None:
    fields = {name for group in GROUPS.values() for name in group.model_fields}
    flags = megatron_flags("The same")
    assert len(flags) > 50
    assert [flag for flag in flags if flag.replace("-", "_") not in fields] == []


def test_flags_called_unavailable_do_not_exist() -> None:
    fields = {name for group in GROUPS.values() for name in group.model_fields}
    flags = megatron_flags("Not available")
    assert len(flags) > 20
    assert [flag for flag in flags if flag.replace("-", "_") in fields] == []
