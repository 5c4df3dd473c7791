"""Manifest of a checkpoint: names of its files, their sizes and hashes, and the check for damage."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import torch

import megatron_adalrs
from megatron_adalrs.engine import deepspeed_version
from megatron_adalrs.utils.text_files import parse_json, read_text

FORMAT = 4
"""Format of the checkpoints. It is raised when their content changes, and no other format is read."""
ENGINE, STATE, MANIFEST, LATEST = "engine", "state.json", "manifest.json", "latest"
WEIGHTS, TOKENIZER = "weights", "tokenizer"  # in a weights-only checkpoint, instead of ENGINE
HASHING_THREADS = 8
CHUNK = 1 << 22


def random_name(rank: int) -> str:
    """Return the name of the file with a rank's random states."""
    return f"random_{rank:05d}.json"


def published_path(aside: Path) -> Path:
    """Return the final path of a checkpoint that was set aside to be replaced; other paths are unchanged."""
    return aside.with_name(aside.name.removeprefix(".").removesuffix(".replaced"))


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(published_path(checkpoint).name.removeprefix("iter_"))


def write_manifest(checkpoint: Path, hashes: dict[str, str], facts: dict[str, Any]) -> None:
    """Write the manifest of a folder whose other files are complete.

    Args:
        hashes: SHA-256 of every file, by its path within the folder.
        facts: Further entries, so that step and mesh are known without reading the state.
    """
    files = {
        name: {"size": (checkpoint / name).stat().st_size, "sha256": digest}
        for name, digest in sorted(hashes.items())
    }
    write_json(
        checkpoint / MANIFEST, {"format": FORMAT, "versions": versions_here(), **facts, "files": files}
    )
    fsync_and_hash(checkpoint / MANIFEST)


def find_damage(checkpoint: Path, hashes: bool = False) -> str | None:
    """Describe the first damage of a checkpoint, or return None if there is none.

    Presence and size of all files are checked, and the hashes of JSON files, which are small. That also
    rejects the manifest of another run.

    Args:
        hashes: Check the hashes of all files.
    """
    try:
        manifest = read_manifest(checkpoint)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is missing or unreadable ({error})"
    if manifest["format"] != FORMAT:
        return f"{MANIFEST} has format {manifest['format']}, required: format {FORMAT}"
    if checkpoint.name.removeprefix("iter_").isdecimal() and step_of(checkpoint) != manifest["step"]:
        return f"{MANIFEST} is of step {manifest['step']}"
    try:
        return _find_damaged_file(checkpoint, manifest["files"], hashes)
    except (OSError, ValueError) as error:  # a disk error, or a name that the file system rejects
        return f"a file cannot be read ({error!s:.200})"


def require_format(checkpoint: Path, flag: str) -> None:
    """Check that a checkpoint is of the format that this version reads.

    A manifest that cannot be read passes: `find_damage` describes what is wrong with it.

    Raises:
        ValueError: The checkpoint was written in another format.
    """
    try:
        written = read_manifest(checkpoint)["format"]
    except (OSError, ValueError):
        return
    if written != FORMAT:
        raise ValueError(
            f"{flag}: {checkpoint} has checkpoint format {written}, but this version of megatron_adalrs "
            f"requires format {FORMAT}"
        )


def _find_damaged_file(checkpoint: Path, files: dict[str, Any], hashes: bool) -> str | None:
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes, {MANIFEST} says {entry['size']}"
    compared = [name for name in files if hashes or name.endswith(".json")]
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for name, actual in zip(
            compared, threads.map(lambda name: sha256(checkpoint / name), compared), strict=True
        ):
            if actual != files[name]["sha256"]:
                return f"{name} has SHA-256 {actual[:12]}..., {MANIFEST} says {files[name]['sha256'][:12]}..."
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a manifest and check the types of its entries.

    Returns:
        All entries, or only `format` if it is not the format of this version.

    Raises:
        OSError: The manifest is missing.
        ValueError: An entry is not valid; the message names it.
    """
    manifest = read_json(checkpoint / MANIFEST)
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise ValueError("it has no format")
    if manifest["format"] != FORMAT:
        return {"format": manifest["format"]}
    if type(manifest.get("step")) is not int or manifest["step"] < 0:
        raise ValueError("step must be a whole number, at least 0")
    versions = manifest.get("versions")
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise ValueError("versions must be strings by name")
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise ValueError(f"files must hold {STATE}")
    for name, entry in files.items():
        _check_file(name, entry)
    return manifest


def describe_other_versions(checkpoint: Path) -> str | None:
    """Describe the versions of packages that wrote an undamaged checkpoint, where they are not those in use.

    Returns:
        None if they are the same. Python's version is not compared.
    """
    theirs, ours = read_manifest(checkpoint)["versions"], versions_here()
    others = {
        name: theirs.get(name, "unknown")
        for name in ours
        if name != "python" and theirs.get(name) != ours[name]
    }
    if not others:
        return None
    listed = ", ".join(f"{name} {version} (here {ours[name]})" for name, version in others.items())
    return f"{checkpoint} was written by {listed}: losses may differ in their last digits"


def versions_here() -> dict[str, str]:
    """Return the versions of the packages that determine what a checkpoint contains."""
    return {
        "megatron_adalrs": megatron_adalrs.__version__,
        "torch": str(torch.__version__),
        "deepspeed": deepspeed_version(),
        "python": platform.python_version(),
    }


def _check_file(name: str, entry: Any) -> None:
    """Check the entry of one file.

    Raises:
        ValueError: The name leads out of the folder or is not normalized, or the size or hash is not valid.
    """
    if (
        not name
        or not name.isprintable()
        or name != str(PurePosixPath(name))
        or name.startswith("/")
        or ".." in name.split("/")
    ):
        raise ValueError(f"files: {name!r:.60} is not a path within the checkpoint")
    if not isinstance(entry, dict) or type(entry.get("size")) is not int or entry["size"] < 0:
        raise ValueError(f"files: {name} has no size")
    digest = entry.get("sha256")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"files: {name} has no SHA-256")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; `fsync_and_hash` brings it to disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def fsync_and_hash(path: Path) -> str:
    """Bring a file to disk and return its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON, or a name appears twice in one object.
    """
    return parse_json(read_text(path))
