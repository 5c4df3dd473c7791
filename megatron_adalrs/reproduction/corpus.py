"""Two corpora that every machine with Python has, as bytes: the standard library's code, and its
documentation."""

from __future__ import annotations

import ast
import json
import math
import sysconfig
import warnings
from pathlib import Path

from megatron_adalrs.preprocessing.preprocess import Recipe, preprocess
from megatron_adalrs.preprocessing.python_sources import collect
from megatron_adalrs.utils.atomic_files import atomic_write

_SHORTEST_PROSE = 200  # characters: below that a file's docstrings are names rather than sentences


def prepare_corpora(folder: Path, names: set[str], limit_mb: float | None = None) -> None:
    """Make what is missing of `folder`/NAME.bin and .idx for each name, "code" or "prose".

    Args:
        limit_mb: size of the sources read, in 10^6 bytes; None: all.

    Raises:
        OSError, ValueError: the sources cannot be read, or the folder cannot be written.
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
    """From a corpus of Python sources, one document a file: its docstrings, or the long texts that it
    consists of.

    Raises:
        ValueError: there is none.
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
    """The docstrings of a source file, in order, an empty line between them; with `every_text` all its
    strings.

    A file of another version of Python, which this one cannot parse, has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    if every_text:
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and _is_text(node.value)
        ]
    else:
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        texts = [text for node in nodes if (text := ast.get_docstring(node))]
    return "\n\n".join(texts)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and " " in value
