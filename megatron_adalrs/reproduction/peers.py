#!/usr/bin/env python3
"""Train the configured model in a plain PyTorch loop, with an optimizer that brings its own idea of the
learning rate.

    python -m megatron_adalrs.reproduction.peers --optimizer schedulefree --config run.yaml \\
        --run-dir runs/peer

The weights, the batches and their order, warm-up, schedule, clipping and evaluation are those of
pretrain_gpt.py with the same configuration: with `--optimizer adamw` so are the losses. One process, fp32.

`lr-range-test-steepest` and `-tenth` are AdamW at a rate that DeepSpeed's LRRangeTest finds first: a short
run, then thrown away, in which the rate is raised from a millionth of `lr` to `lr`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_adalrs.cli.arguments import config_from_values, load_yaml
from megatron_adalrs.config import Config
from megatron_adalrs.data.loader import BatchLoader
from megatron_adalrs.data.vocabulary import resolve_vocabulary
from megatron_adalrs.metrics import JsonLines, Metrics
from megatron_adalrs.model.gpt import GPT, count_parameters, initialise
from megatron_adalrs.optim.lr_schedule import build_schedule
from megatron_adalrs.optim.optimizer import build_optimizer
from megatron_adalrs.training.data import batches_in_one_pass, build_datasets
from megatron_adalrs.training.evaluation import Evaluation
from megatron_adalrs.training.run_directory import run_dir_of, with_run_dir, write_config
from megatron_adalrs.utils.format import perplexity

RANGE_TESTS = ("lr-range-test-steepest", "lr-range-test-tenth")
RANGE = 1e-6
"""First rate of a range test over its last."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--optimizer", choices=["adamw", "prodigy", "schedulefree", *RANGE_TESTS], required=True
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file, as for `pretrain --config`")
    parser.add_argument("--run-dir", type=Path, required=True, help="where metrics.jsonl is written")
    options = parser.parse_args()
    try:
        config = config_from_values(load_yaml(options.config) | {"run_dir": str(options.run_dir)})
        train(config, options.optimizer)
    except ImportError as error:
        print(
            f"error: --optimizer {options.optimizer}: {error}: pip install 'megatron-adalrs[peers]'",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(config: Config, kind: str) -> None:
    """All steps, with an evaluation at each interval and at the end.

    Raises:
        ValueError, OSError: the configuration, its data or its directory cannot be used.
        ImportError: the optimizer's package is not installed.
    """
    if config.data.marks_documents:
        raise ValueError(
            "reset_attention_mask, reset_position_ids, eod_mask_loss: required off with other optimizers"
        )
    config = with_run_dir(config)
    vocab_size = resolve_vocabulary(config).size
    size = config.global_batch_size(1)
    datasets = build_datasets(config, size)
    if len(datasets.valid) != 1:
        raise ValueError(f"data_path: {len(datasets.valid)} corpora to validate on: required one")
    train_set, valid_set = datasets.train, datasets.valid[0].dataset
    write_config(config)
    metrics = Metrics([JsonLines(run_dir_of(config) / "metrics.jsonl", frozenset({"train", "eval", "run"}))])
    metrics.write("run", event_of("start", 0) | {"parameters": count_parameters(config.model, vocab_size)})
    iters, every = config.training.train_iters, config.run.eval_interval
    with loader(train_set, config) as batches, loader(valid_set, config) as held_out:
        passes = batches_in_one_pass(valid_set, config.run.eval_iters, size)
        evaluation = Evaluation("valid", held_out, passes)
        peak, tested = config.optimizer.lr, 0
        if kind in RANGE_TESTS:
            peak, tested = range_test(kind, new_model(config, vocab_size), config, batches, metrics)
        model = new_model(config, vocab_size)
        optimizer, schedule = make_optimizer(kind, model, config)
        for step in range(iters):
            started = time.perf_counter()
            set_rate(optimizer, peak * schedule(step))
            loss = train_step(
                model, optimizer, batches.micro_batches(step * size), config.optimizer.clip_grad
            )
            seconds = time.perf_counter() - started
            record = train_record(
                step + 1, loss, optimizer, config, seconds, tested, peak / config.optimizer.lr
            )
            metrics.write("train", record)
            if step + 1 == iters or (every and (step + 1) % every == 0):
                loss = evaluate(model, optimizer, evaluation)
                place = {"split": "valid", "step": step + 1, "total_steps": tested + step + 1}
                metrics.write("eval", place | {"loss": loss, "perplexity": perplexity(loss)})
    metrics.write("run", event_of("end", iters, tested))
    metrics.close()


def new_model(config: Config, vocab_size: int) -> GPT:
    """The model as it is before its first step."""
    torch.manual_seed(config.training.seed)
    model = GPT(config.model, vocab_size)
    initialise(model, config.model, config.training.seed)
    return model


def range_test(
    kind: str, model: GPT, config: Config, batches: BatchLoader, metrics: Metrics
) -> tuple[float, int]:
    """The rate that a range test finds, and how many steps it took: a tenth of the run, but no fewer than 50.

    DeepSpeed's schedule raises the rate by equal amounts (arXiv 1803.09820), which would pass the lower five
    decades in one step: its position is moved so that each step raises it by the same factor, as in fastai's
        `lr_find`.
    """
    from megatron_adalrs.engine.lr_range_test import lr_range_test

    steps = min(config.training.train_iters, max(50, config.training.train_iters // 10))
    optimizer = build_optimizer(model, config.optimizer)
    lowest = RANGE * config.optimizer.lr
    ramp = lr_range_test(optimizer, lowest)
    rates, losses = [], []
    for step in range(steps):
        ramp.step(RANGE ** (-step / (steps - 1)) - 2)  # lowest x (1 + position), the position counted from -1
        started = time.perf_counter()
        micro_batches = batches.micro_batches(step * config.global_batch_size(1))
        losses.append(train_step(model, optimizer, micro_batches, config.optimizer.clip_grad))
        rates.append(ramp.get_last_lr()[0])
        record = train_record(step + 1, losses[-1], optimizer, config, time.perf_counter() - started)
        metrics.write("train", record | {"phase": "trial"})
        if not losses[-1] < 4 * min(losses):  # it blows up, as fastai's `lr_find` has it
            break
    return found_rate(kind, rates, losses, max(1, steps // 20)), len(rates)


def found_rate(kind: str, rates: Sequence[float], losses: Sequence[float], reach: int) -> float:
    """What a range test comes to: the rate at which the loss falls most steeply, or a tenth of where it is
    lowest.

    The latter is the rule of S. Gugger, "How do you find a good learning rate" (2018), the former that of
    fastai's and Lightning's finders, which suggest it. A loss is the mean over `reach` steps before and
    behind: fastai's running average lags.

    Raises:
        ValueError: the losses are fewer than a mean needs, or not finite from the start.
    """
    finite = np.asarray(losses)[np.logical_and.accumulate(np.isfinite(losses))]
    width = 2 * reach + 1
    if len(finite) < width + 1:
        raise ValueError(
            f"the range test blew up after {len(finite)} steps, at a rate of {rates[len(finite) - 1]:.2g}"
        )
    smooth = np.convolve(finite, np.full(width, 1 / width), "valid")
    if kind.endswith("tenth"):
        return rates[reach + int(smooth.argmin())] / 10
    return rates[reach + int(np.gradient(smooth).argmin())]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_optimizer(
    kind: str, model: GPT, config: Config
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """The optimizer, with AdamW's groups, decay and betas, and the factor on its rate at each step.

    Raises:
        ImportError: the package is not installed.
    """
    settings = config.optimizer
    plain = build_optimizer(model, settings)
    schedule = build_schedule(config)
    if kind == "adamw" or kind in RANGE_TESTS:
        return plain, schedule
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]} for group in plain.param_groups
    ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    if kind == "prodigy":
        from prodigyopt import Prodigy

        # As its authors advise for transformers with warm-up (arXiv 2306.06101 and the package's README).
        options = {"safeguard_warmup": True, "use_bias_correction": True}
        return Prodigy(groups, lr=settings.lr, betas=betas, eps=settings.adam_eps, **options), schedule
    from schedulefree import AdamWScheduleFree

    # It warms up by itself, and its average stands in for a decay (arXiv 2405.15682).
    optimizer = AdamWScheduleFree(
        groups, lr=settings.lr, betas=betas, eps=settings.adam_eps, warmup_steps=settings.lr_warmup_iters
    )
    return optimizer, lambda step: 1.0


def train_step(model: GPT, optimizer: torch.optim.Optimizer, micro_batches: list, clip: float) -> float:
    """One step; the mean loss of its micro-batches."""
    set_mode(optimizer, "train")
    optimizer.zero_grad()
    total = 0.0
    for batch in micro_batches:
        loss = model(torch.from_numpy(batch)) / len(micro_batches)
        loss.backward()
        total += loss.item()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return total


@torch.no_grad()
def evaluate(model: GPT, optimizer: torch.optim.Optimizer, evaluation: Evaluation) -> float:
    """Mean loss on the held-out batches."""
    set_mode(optimizer, "eval")
    model.eval()
    losses = [model(torch.from_numpy(batch)).item() for batches in evaluation.steps() for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def set_mode(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Schedule-free optimizers evaluate at other weights than they train at."""
    switch = getattr(optimizer, mode, None)
    if switch:
        switch()


def loader(dataset, config: Config) -> BatchLoader:
    """One process's batches."""
    return BatchLoader(dataset, config.training.micro_batch_size, 0, 1, config.micro_batches_per_step(1))


def train_record(
    step: int,
    loss: float,
    optimizer: torch.optim.Optimizer,
    config: Config,
    seconds: float,
    discarded: int = 0,
    scale: float = 1.0,
) -> dict:
    """`discarded`: steps of a range test before. `scale`: what it made of the configured rate."""
    tokens = config.global_batch_size(1) * config.model.seq_length
    return {
        "step": step,
        "total_steps": discarded + step,
        "loss": loss,
        "lr": optimizer.param_groups[0]["lr"],
        "scale": scale,
        "phase": "fixed",
        "seconds": seconds,
        "consumed_tokens": step * tokens,
        "discarded_tokens": discarded * tokens,
    }


def event_of(event: str, step: int, discarded: int = 0) -> dict:
    return {"event": event, "step": step, "total_steps": discarded + step}


if __name__ == "__main__":
    sys.exit(main())
