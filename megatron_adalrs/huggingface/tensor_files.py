"""Read and write safetensors files with one tensor in memory at a time.

A file is the length of its header in 8 bytes, the header in JSON, and the tensors one after the other, all
little-endian: https://github.com/huggingface/safetensors#format. The writer of the package safetensors holds
a whole shard in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_adalrs.utils.format import first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes, of the end of the header


@dataclass(frozen=True)
class Entry:
    """Name, dtype and shape of a stored tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The tensors in a folder, in a single file or in the shards that its index names.

    Raises:
        ValueError: A file is missing or damaged, or the package safetensors is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ValueError(
                "safetensors files need the package safetensors: pip install 'megatron-adalrs[hf]'"
            ) from error
        self._files: dict[str, Any] = {}
        for name in _files_of(folder):
            path = folder / name
            try:
                file: Any = safe_open(str(path), framework="pt", device="cpu")
                self._files |= dict.fromkeys(file.keys(), file)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"cannot read {path}: {first_line(error)}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def entry(self, name: str) -> Entry:
        """Return dtype and shape of a tensor.

        Raises:
            ValueError: Its dtype is not a supported floating-point type.
        """
        found = self._files[name].get_slice(name)
        if found.get_dtype() not in DTYPES:
            raise ValueError(f"{name} has dtype {found.get_dtype()}: required one of {', '.join(DTYPES)}")
        return Entry(name, DTYPES[found.get_dtype()], tuple(found.get_shape()))

    def __call__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _files_of(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(
            f"{folder} has neither {SINGLE} nor {INDEX}: weights in other formats are not supported"
        )
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        if any(not isinstance(name, str) or Path(name).name != name for name in files):
            raise ValueError("weight_map must name files of this folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        kind = f"{type(error).__name__}: " if isinstance(error, (KeyError, TypeError)) else ""
        raise ValueError(f"cannot read {index}: {kind}{error}") from None
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {', '.join(missing)}, which {INDEX} names")
    return files


def write_tensors(
    folder: Path, entries: Iterable[Entry], value: Callable[[str], Tensor], max_shard_size: int
) -> None:
    """Write a single file, or shards and their index, into an empty folder and bring them to disk.

    Args:
        value: Returns the tensor of an entry, which is cast to the entry's dtype. It is called once per
            entry, in order, except that larger dtypes come first within a shard, for alignment.
        max_shard_size: Size in bytes; a single tensor may be larger.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + entry.nbytes > max_shard_size:
            shards.append([])
        shards[-1].append(entry)
    count = len(shards)
    names = (
        [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, sorted(shard, key=lambda entry: -entry.dtype.itemsize), value)
    if count > 1:
        places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.nbytes for shard in shards for entry in shard)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, entries: Sequence[Entry], value: Callable[[str], Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = value(entry.name)
            assert tensor.shape == entry.shape, f"{entry.name} is {tuple(tensor.shape)}, not {entry.shape}"
            file.write(tensor.to(entry.dtype).contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
