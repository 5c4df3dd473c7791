"""Byte-level corpora that every machine with Python has: code and documentation of the standard library."""

from __future__ import annotations

import ast
import json
import math
import sysconfig
import warnings
from pathlib import Path

from megatron_adalrs.preprocessing.encoding import Recipe
from megatron_adalrs.preprocessing.preprocess import preprocess
from megatron_adalrs.preprocessing.python_sources import collect
from megatron_adalrs.utils.atomic_files import atomic_write

_SHORTEST_PROSE = 200
"""Characters of docstrings that a file must have; fewer are mostly names rather than sentences."""


def prepare_corpora(folder: Path, names: set[str], limit_mb: float | None = None) -> None:
    """Write `folder`/NAME.bin and .idx for each name, if they do not exist.

    Args:
        folder: Folder of the data sets.
        names: "code" or "prose".
        limit_mb: Size of the sources that are read, in 10^6 bytes. Default: all.

    Raises:
        OSError: The sources cannot be read, or the folder cannot be written.
        ValueError: The sources have no documentation.
    """
    missing = [name for name in sorted(names) if not (folder / f"{name}.json").exists()]
    if not missing:
        return
    code = folder / "code.jsonl"
    if not code.exists():
        limit_bytes = limit_mb * 1e6 if limit_mb else math.inf
        collect(Path(sysconfig.get_path("stdlib")), code, limit_bytes)
    if "prose" in missing:
        write_prose(code, folder / "prose.jsonl")
    for name in missing:
        preprocess(
            folder / f"{name}.jsonl", folder / name, Recipe("ByteTokenizer"), overwrite=True, restart=True
        )


def write_prose(code: Path, output: Path) -> None:
    """Write the docstrings of a corpus of Python sources, one document per file.

    Raises:
        ValueError: There are no docstrings.
    """
    documents = 0
    with code.open(encoding="utf-8") as lines, atomic_write(output) as stream:
        for line in lines:
            record = json.loads(line)
            text = prose_of(record["text"], every_text=record["path"].startswith("pydoc_data/"))
            if len(text) >= _SHORTEST_PROSE:
                stream.write(json.dumps({"path": record["path"], "text": text}).encode() + b"\n")
                documents += 1
        if not documents:
            raise ValueError(f"{code}: no docstrings of {_SHORTEST_PROSE} characters in any file")


def prose_of(source: str, every_text: bool = False) -> str:
    """Return the docstrings of a source file, separated by empty lines.

    Args:
        source: Text of the file. One that this version of Python cannot parse has no docstrings.
        every_text: Return all strings with spaces instead, for files that consist of texts.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    if every_text:
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        texts = [value for value in constants if isinstance(value, str) and " " in value]
    else:
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        texts = [text for node in nodes if (text := ast.get_docstring(node))]
    return "\n\n".join(texts)
