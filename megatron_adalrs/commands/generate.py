"""Complete a prompt with the model of a run, a checkpoint or a Hugging Face folder.

    megatron-adalrs generate runs/NAME --prompt "def main(" --max-new-tokens 100
    megatron-adalrs generate Qwen2.5-0.5B --prompt "The learning rate" --temperature 0.8 --samples 3

Decoding is greedy unless --temperature is given. The completion is printed while it is generated, without the
prompt.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_adalrs.cli.program import INTERRUPTED, TokenizerFlags, parse_flags, reports_errors
from megatron_adalrs.utils.text_files import read_text


@dataclass(frozen=True)
class Arguments(TokenizerFlags):
    source: Annotated[Path, tyro.conf.Positional]
    """Run directory, checkpoint, or folder with config.json and safetensors."""
    prompt: str | None = None
    """Text to complete."""
    prompt_file: Path | None = None
    """File with the text to complete; - reads standard input."""
    max_new_tokens: int = 100
    """Maximum number of tokens to generate. Generation also stops at an end-of-document token and at the
    model's last position."""
    temperature: float = 0.0
    """Divisor of the logits; 0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    top_k: int = 0
    """Sample from this number of most likely tokens; 0 means all."""
    samples: int = 1
    """Number of completions of the prompt."""
    seed: int = 0
    """Seed of the sampling."""
    dtype: str | None = None
    """Precision of the computation, float32 or bfloat16. Default: that of the training, or of the model's
    files."""


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Generate and print completions.

    Returns:
        0; 2 if a flag is not valid or a file cannot be read; 130 after Ctrl-C.
    """
    flags = parse_flags(Arguments, __doc__, arguments)
    try:
        generate(flags)
    except KeyboardInterrupt:
        print()
        return INTERRUPTED
    return 0


def generate(given: Arguments) -> None:
    """Generate and print completions.

    Raises:
        ValueError: A flag is not valid, or the model or its tokenizer cannot be used.
        OSError: A file cannot be read.
    """
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
    from megatron_adalrs.data.tokenizer import tokenizer_paths
    from megatron_adalrs.inference.model import best_device, tokenizer_of, whole_model
    from megatron_adalrs.inference.sampling import Sampling, complete

    sampling = Sampling(given.temperature, given.top_p, given.top_k)
    opened = open_model(locate_model(given.source, "model"), "model")
    tokenizer = tokenizer_of(opened, given.tokenizer_type, *tokenizer_paths(given))
    ids = tokenizer.encode(prompt) or [tokenizer.eod]  # an empty prompt is the beginning of a document
    model = whole_model(opened, getattr(torch, given.dtype) if given.dtype else None, best_device())
    found: list[list[int]] = [[] for _ in range(given.samples)]
    printed = ""
    began = time.monotonic()
    for tokens in complete(
        model, ids, given.max_new_tokens, sampling, given.samples, given.seed, tokenizer.eod
    ):
        for sample, token in zip(found, tokens, strict=True):
            if token is not None:
                sample.append(token)
        if given.samples == 1:
            printed = print_new(tokenizer.decode(found[0]), printed)
    seconds = time.monotonic() - began
    for number, sample in enumerate(found):
        text = tokenizer.decode(sample)
        if given.samples == 1:
            print(text[len(printed) :], flush=True)
        else:
            print(f"--- {number + 1}\n{text}")
    count = sum(map(len, found))
    ended = "" if max(map(len, found)) == given.max_new_tokens else ", ended before the limit"
    print(f"{count} tokens, {count / seconds:.1f} per second{ended}", file=sys.stderr)


def prompt_of(given: Arguments) -> str:
    """Return the prompt of --prompt or --prompt-file.

    Raises:
        ValueError: Not exactly one of the flags is given, or the text is not UTF-8.
    """
    if (given.prompt is None) == (given.prompt_file is None):
        raise ValueError("prompt: give either --prompt or --prompt-file")
    try:
        if given.prompt is not None:
            source, text = "prompt: it", given.prompt
        elif str(given.prompt_file) == "-":
            source, text = "prompt_file: standard input", sys.stdin.read().removeprefix("\ufeff")
        else:
            source = f"prompt_file: {given.prompt_file}"
            assert given.prompt_file is not None, "one of the two flags is given"
            text = read_text(given.prompt_file)
        text.encode()  # bytes of the command line and standard input that are not UTF-8 become surrogates
    except UnicodeError as error:
        raise ValueError(f"{source} is not UTF-8: {error}") from None
    return text


def print_new(text: str, printed: str) -> str:
    """Print the part of a text that has not been printed yet, without an incomplete last character.

    Returns:
        The text that has been printed so far.
    """
    whole = text.rstrip("\ufffd")
    if whole.startswith(printed) and len(whole) > len(printed):
        print(whole[len(printed) :], end="", flush=True)
        return whole
    return printed


if __name__ == "__main__":
    sys.exit(main())
