"""Sphinx extension: tables generated from the code while the pages are read.

A page contains a placeholder such as `<!-- table: flags -->`, which is replaced by the table of that name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx

from megatron_adalrs.cli.aliases import ALIASES, DERIVED, TOKENIZERS
from megatron_adalrs.cli.arguments import GROUPS, NESTED_FIELDS
from megatron_adalrs.commands import COMMANDS
from megatron_adalrs.config.on_resume import ON_RESUME
from megatron_adalrs.model.presets import PRESETS

PLACEHOLDER = re.compile(r"<!-- table: (\w+) -->")
TITLES = {
    "model": "Model",
    "data": "Data and tokenizer",
    "optimizer": "Optimizer and schedule",
    "training": "Length, batch, precision and sharding",
    "parallel": "Parallelism",
    "run": "Run directory, checkpoints and logging",
    "loss_guard": "Loss guard",
    "adalrs": "Learning-rate search",
}


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("source-read", _insert_tables)
    app.connect("autodoc-process-docstring", _mark_code_blocks, priority=400)  # before napoleon
    return {"parallel_read_safe": True}


def _insert_tables(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = PLACEHOLDER.sub(lambda found: TABLES[found[1]](), source[0])


def _mark_code_blocks(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Mark indented blocks after a blank line, which docstrings use for code as Markdown does."""
    for index in range(len(lines) - 1, 1, -1):
        text, blank, code = lines[index - 2 : index + 1]
        if text[:1].strip() and not blank.strip() and code.startswith("    ") and not text.endswith("::"):
            lines[index:index] = ["::", ""]


def flag_sections() -> str:
    """Return a section with a table for each group of the configuration."""
    groups = {name: (group.model_fields, "") for name, group in GROUPS.items()}
    groups |= {name: (fields, f"{name.replace('_', '-')}.") for name, fields in NESTED_FIELDS.items()}
    return "\n\n".join(_section(TITLES.get(name, name), *group) for name, group in groups.items())


def alias_table() -> str:
    """Return the table of Megatron-LM's flags that are accepted under another name."""
    rows = []
    for alias in ALIASES:
        meaning = f"`{alias.replacement} {alias.value or ''}".strip() + "`"
        rows.append((f"`{alias.flag}`", meaning))
    rows += [(f"`{derived.flag}`", derived.meaning) for derived in DERIVED]
    rows += [
        (f"`--tokenizer-type {theirs}`", f"`--tokenizer-type {ours}`") for theirs, ours in TOKENIZERS.items()
    ]
    return _table(("Megatron-LM", "here"), sorted(rows))


def command_table() -> str:
    """Return the table of the program's commands."""
    rows = [(f"`megatron-adalrs {name}`", command.summary) for name, command in COMMANDS.items()]
    return _table(("command", "purpose"), rows)


def preset_table() -> str:
    """Return the table of the presets and their shapes."""
    fields = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "seq_length")
    rows = [
        (f"`{name}`", *(str(shape.get(field, "")) for field in fields)) for name, shape in PRESETS.items()
    ]
    return _table(("preset", "layers", "width", "heads", "key-value heads", "sequence length"), rows)


def resume_table() -> str:
    """Return the table of all fields and what a change of each does when a run is resumed."""
    rows = [
        (", ".join(f"`{name}`" for name, found in ON_RESUME.items() if found is policy), policy.value)
        for policy in dict.fromkeys(ON_RESUME.values())
    ]
    return _table(("fields", "a change on resume"), rows)


def layer_table() -> str:
    """Return the table of import layers that the architecture test checks."""
    source = (Path(__file__).parent.parent / "tests" / "test_architecture.py").read_text()
    layers = re.search(r"^LAYERS = (\[.*?^\])", source, re.MULTILINE | re.DOTALL)
    assert layers, "tests/test_architecture.py defines LAYERS"
    rows = [(", ".join(f"`{name}`" for name in sorted(names)),) for names in ast.literal_eval(layers[1])]
    return _table(("packages",), rows)


def development_pages() -> str:
    """Return the names of the pages in docs/ itself that are not for users, for a table of contents."""
    pages = {path.stem for path in Path(__file__).parent.glob("*.md")}
    return "\n".join(sorted(pages - {"index", "tutorial", "faq", "glossary"}))


TABLES = {
    "development": development_pages,
    "layers": layer_table,
    "flags": flag_sections,
    "aliases": alias_table,
    "commands": command_table,
    "presets": preset_table,
    "on_resume": resume_table,
}


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _escape(cell: str) -> str:
    """Escape what would end a cell or begin an HTML tag, the latter only outside of code."""
    parts = cell.replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def _section(title: str, fields: Mapping[str, FieldInfo], prefix: str) -> str:
    rows = [
        (
            f"`--{prefix}{name.replace('_', '-')}`",
            _kind(field.annotation),
            _default(field),
            " ".join((field.description or "").split()),
        )
        for name, field in fields.items()
    ]
    return f"## {title}\n\n" + _table(("flag", "values", "default", "meaning"), rows)


def _kind(annotation: Any) -> str:
    """Return the values that a type accepts, in a reader's terms."""
    text = str(annotation)
    choices = re.search(r"Literal\[([^\]]*)\]", text)
    if choices:
        return " ".join(f"`{choice.strip(chr(39))}`" for choice in choices[1].split(", "))
    if "tuple" in text:
        return "text ..."
    kinds = (("bool", "on / off"), ("int", "integer"), ("float", "number"), ("Path", "path"))
    return next((shown for found, shown in kinds if found in text), "text")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return "" if field.default in (None, PydanticUndefined) else f"`{field.default}`"
