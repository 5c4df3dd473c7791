"""Let a model complete a prompt: of a run, a checkpoint, or a folder of Hugging Face's.

    python tools/generate.py runs/NAME --prompt "def main(" --max-new-tokens 100
    python tools/generate.py Qwen2.5-0.5B --prompt "The learning rate" --temperature 0.8 --top-p 0.95 --samples 3

The likeliest token is taken each time unless --temperature is given. Text is printed as it comes; the prompt is
not printed again. The keys and values of what came before are kept, not computed again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Arguments:
    source: Annotated[Path, tyro.conf.Positional]
    """Run, checkpoint or folder with config.json and safetensors."""
    prompt: str | None = None
    """The text to complete."""
    prompt_file: Path | None = None
    """A file with it; - reads standard input."""
    max_new_tokens: int = 100
    """Most tokens to add: fewer where the model ends the document, or has no more positions."""
    temperature: float = 0.0
    """Divides the logits; 0: always the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0: all."""
    samples: int = 1
    """Completions, all of the same prompt."""
    seed: int = 0
    """Of what is drawn."""
    tokenizer_type: str | None = None
    """SentencePieceTokenizer, HuggingFaceTokenizer, GPT2BPETokenizer or ByteTokenizer. Default: the one that belongs to
    the model."""
    tokenizer_model: str | None = None
    """The tokenizer's file (or folder)."""
    vocab_file: str | None = None
    """GPT2BPETokenizer's vocab.json."""
    merge_file: str | None = None
    """GPT2BPETokenizer's merges.txt."""
    dtype: str | None = None
    """float32 or bfloat16. Default: the precision that the model was trained in, or that of its files."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 where it was asked for something impossible."""
    given = tyro.cli(Arguments, args=arguments, description=__doc__)
    try:
        generate(given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def generate(given: Arguments) -> None:
    """Raises ValueError, OSError: a flag asks for something impossible, or something cannot be read."""
    for name in ("max_new_tokens", "samples"):
        if getattr(given, name) < 1:
            raise ValueError(f"{name}: {getattr(given, name)}: must be at least 1")
    if not 0 <= given.seed < 2**63:
        raise ValueError(f"seed: {given.seed}: must be 0 to 2^63 - 1")
    if given.dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype: {given.dtype}: must be float32 or bfloat16")
    prompt = prompt_of(given)
    import torch

    from megatron_adalrs.checkpoint import locate_model, open_model
    from megatron_adalrs.data.tokenizer import files_named
    from megatron_adalrs.inference.model import best_device, tokenizer_of, whole_model
    from megatron_adalrs.inference.sampling import Sampling, complete

    sampling = Sampling(given.temperature, given.top_p, given.top_k)
    opened = open_model(locate_model(given.source, "model"), "model")
    tokenizer = tokenizer_of(opened, given.tokenizer_type, *files_named(given))
    ids = tokenizer.encode(prompt) or [tokenizer.eod]  # an empty prompt is the beginning of a document
    model = whole_model(opened, getattr(torch, given.dtype) if given.dtype else None, best_device())
    found: list[list[int]] = [[] for _ in range(given.samples)]
    told = ""
    began = time.monotonic()
    for tokens in complete(
        model, ids, given.max_new_tokens, sampling, given.samples, given.seed, tokenizer.eod
    ):
        for sample, token in zip(found, tokens, strict=True):
            if token is not None:
                sample.append(token)
        if given.samples == 1:
            told = tell_more(tokenizer.decode(found[0]), told)
    seconds = time.monotonic() - began
    for number, sample in enumerate(found):
        text = tokenizer.decode(sample)
        if given.samples == 1:
            print(text[len(told) :], flush=True)
        else:
            print(f"--- {number + 1}\n{text}")
    count = sum(map(len, found))
    ended = "" if max(map(len, found)) == given.max_new_tokens else ", ended before the limit"
    print(f"{count} tokens, {count / seconds:.1f} a second{ended}", file=sys.stderr)


def prompt_of(given: Arguments) -> str:
    if (given.prompt is None) == (given.prompt_file is None):
        raise ValueError("prompt: give either --prompt or --prompt-file")
    try:
        if given.prompt is not None:
            source, text = "prompt: it", given.prompt
        elif str(given.prompt_file) == "-":
            source, text = "prompt_file: standard input", sys.stdin.read()
        else:
            source = f"prompt_file: {given.prompt_file}"
            text = given.prompt_file.read_text(encoding="utf-8")
        text.encode()  # what is not UTF-8 comes as half characters from the command line and standard input
    except UnicodeError as error:
        raise ValueError(f"{source} is not UTF-8: {error}") from None
    return text


def tell_more(text: str, told: str) -> str:
    """Print what is new of a text, up to a character of which only the first bytes are there. Returns what is told."""
    whole = text.rstrip("\ufffd")
    if whole.startswith(told) and len(whole) > len(told):
        print(whole[len(told) :], end="", flush=True)
        return whole
    return told
