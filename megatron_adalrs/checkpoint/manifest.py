"""What a checkpoint consists of: names of its parts, the manifest, and what is wrong with one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import megatron_adalrs
from megatron_adalrs.engine import deepspeed_version

FORMAT = 2
ENGINE, STATE, MANIFEST, LATEST = "engine", "state.json", "manifest.json", "latest"
HASHING_THREADS = 8
CHUNK = 1 << 22


def random_name(rank: int) -> str:
    """File of a rank's random streams."""
    return f"random_{rank:05d}.json"


def write_manifest(checkpoint: Path, hashes: dict[str, str], facts: dict[str, Any]) -> None:
    """Write the manifest of a folder that is otherwise complete.

    Args:
        hashes: SHA-256 of every file, by its path within the folder.
        facts: what tells checkpoints apart without reading their state: step, grid.
    """
    versions = {
        "megatron_adalrs": megatron_adalrs.__version__,
        "torch": torch.__version__,
        "deepspeed": deepspeed_version(),
        "python": platform.python_version(),
    }
    files = {
        name: {"size": (checkpoint / name).stat().st_size, "sha256": digest} for name, digest in sorted(hashes.items())
    }
    write_json(checkpoint / MANIFEST, {"format": FORMAT, "versions": versions, **facts, "files": files})
    secured(checkpoint / MANIFEST)


def find_damage(checkpoint: Path, hashes: bool = False) -> str | None:
    """What is wrong with a checkpoint's files: presence and size, with `hashes` content too; None if nothing is."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is missing or unreadable ({error})"
    for name, (size, _) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {MANIFEST} says {size}"
    if not hashes:
        return None
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        found = threads.map(lambda name: sha256(checkpoint / name), expected)
        for (name, (_, digest)), actual in zip(expected.items(), found, strict=True):
            if actual != digest:
                return f"{name} has SHA-256 {actual[:12]}..., {MANIFEST} says {digest[:12]}..."
    return None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write; `secured` brings it to disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def secured(path: Path) -> str:
    """Bring a file to disk. Returns its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
