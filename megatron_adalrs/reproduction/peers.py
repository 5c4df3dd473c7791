r"""Train the configured model in a plain PyTorch loop with an optimizer that finds its own learning rate.

    python -m megatron_adalrs.reproduction.peers --optimizer schedulefree --config run.yaml \
        --run-dir runs/peer

Weights, batches and their order, warm-up, schedule, clipping and evaluation are those of `megatron-adalrs
pretrain` with the same configuration; with `--optimizer adamw` the losses are equal too. The loop runs in one
process in fp32.

`lr-range-test-steepest` and `lr-range-test-tenth` are AdamW at a rate that DeepSpeed's LRRangeTest finds
first: in a short run, which is discarded, the rate is raised from a millionth of `lr` to `lr`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_adalrs.cli.arguments import config_from_values, load_yaml
from megatron_adalrs.cli.program import reports_errors
from megatron_adalrs.config import Config
from megatron_adalrs.data.loader import BatchLoader, MicroBatches, SampleDataset
from megatron_adalrs.data.vocabulary import resolve_vocabulary
from megatron_adalrs.metrics import JsonLines, Metrics
from megatron_adalrs.model.gpt import GPT, count_parameters
from megatron_adalrs.model.initialization import init_weights
from megatron_adalrs.optim.lr_schedule import build_schedule
from megatron_adalrs.optim.optimizer import build_optimizer
from megatron_adalrs.reproduction.plan import RANGE_TESTS
from megatron_adalrs.run_directory import RunDirectory, RunFolders, RunIdentity
from megatron_adalrs.training.data import batches_in_one_pass, build_datasets
from megatron_adalrs.training.evaluation import Evaluation
from megatron_adalrs.utils.format import perplexity

RANGE = 1e-6
"""First rate of a range test divided by its last."""
Optimizer = torch.optim.Optimizer


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Train with an optimizer and return the exit code: 0, or 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--optimizer", choices=["adamw", "prodigy", "schedulefree", *RANGE_TESTS], required=True
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file, as for `pretrain --config`")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder for metrics.jsonl")
    options = parser.parse_args(arguments)
    config = config_from_values(load_yaml(options.config) | {"run_dir": str(options.run_dir)})
    try:
        train(config, options.optimizer)
    except ImportError as error:
        raise ValueError(
            f"--optimizer {options.optimizer}: {error}: pip install 'megatron-adalrs[peers]'"
        ) from error
    return 0


def train(config: Config, kind: str) -> None:
    """Train all steps, and evaluate at each interval and at the end.

    Args:
        config: Configuration of the run.
        kind: Name of the optimizer.

    Raises:
        ValueError: The configuration or its data cannot be used.
        OSError: The run directory cannot be written.
        ImportError: The package of the optimizer is not installed.
    """
    if config.data.marks_documents:
        raise ValueError(
            "reset_attention_mask, reset_position_ids, eod_mask_loss: required off with other optimizers"
        )
    directory = RunDirectory(RunFolders.of(config.run))
    try:
        directory.require_new()
        _train_in(directory, config, kind)
    finally:
        directory.release()


def _train_in(directory: RunDirectory, config: Config, kind: str) -> None:
    vocab_size = resolve_vocabulary(config).size
    size = config.global_batch_size(1)
    datasets = build_datasets(config, size)
    if len(datasets.valid) != 1:
        raise ValueError(f"data_path: {len(datasets.valid)} corpora to validate on: required one")
    train_set, valid_set = datasets.train, datasets.valid[0].dataset
    directory.claim(RunIdentity.new())
    directory.write_config(config.to_flat())
    metrics = Metrics(
        [JsonLines(directory.folders.run_dir / "metrics.jsonl", frozenset({"train", "eval", "run"}))]
    )
    parameters = count_parameters(config.model, vocab_size)
    metrics.write("run", event_record("start", 0) | {"parameters": parameters})
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
    metrics.write("run", event_record("end", iters, tested))
    metrics.close()


def new_model(config: Config, vocab_size: int) -> GPT:
    """Return the model with its initial weights."""
    torch.manual_seed(config.training.seed)
    model = GPT(config.model, vocab_size)
    init_weights(model, config.model, config.training.seed)
    return model


def range_test(
    kind: str, model: GPT, config: Config, batches: BatchLoader, metrics: Metrics
) -> tuple[float, int]:
    """Run a range test of a tenth of the run, but at least 50 steps.

    DeepSpeed's schedule raises the rate by equal amounts (arXiv 1803.09820), which would cover the lower five
    decades in one step. Its position is moved so that each step raises the rate by the same factor, as in
    fastai's `lr_find`.

    Returns:
        The rate that was found, and the number of steps.
    """
    from megatron_adalrs.engine.learning_rate import lr_range_test

    steps = min(config.training.train_iters, max(50, config.training.train_iters // 10))
    optimizer = build_optimizer(model, config.optimizer)
    lowest = RANGE * config.optimizer.lr
    ramp = lr_range_test(optimizer, lowest)
    rates, losses = [], []
    for step in range(steps):
        ramp.step(RANGE ** (-step / (steps - 1)) - 2)  # rate = lowest * (2 + argument)
        started = time.perf_counter()
        micro_batches = batches.micro_batches(step * config.global_batch_size(1))
        losses.append(train_step(model, optimizer, micro_batches, config.optimizer.clip_grad))
        rates.append(ramp.get_last_lr()[0])
        record = train_record(step + 1, losses[-1], optimizer, config, time.perf_counter() - started)
        metrics.write("train", record | {"phase": "trial"})
        if not losses[-1] < 4 * min(losses):  # diverged, by the criterion of fastai's `lr_find`
            break
    return found_rate(kind, rates, losses, max(1, steps // 20)), len(rates)


def found_rate(kind: str, rates: Sequence[float], losses: Sequence[float], reach: int) -> float:
    """Return the rate at which the loss falls most steeply, or a tenth of the rate at which it is lowest.

    The latter is the rule of S. Gugger, "How do you find a good learning rate" (2018), the former that of
    the finders of fastai and Lightning. Every loss is averaged over `reach` steps before and after it,
    because fastai's running average lags.

    Args:
        kind: One of `RANGE_TESTS`.
        rates: Learning rates of the steps.
        losses: Losses of the steps.
        reach: Number of steps before and after a loss over which it is averaged.

    Raises:
        ValueError: There are too few finite losses.
    """
    finite = np.asarray(losses)[np.logical_and.accumulate(np.isfinite(losses))]
    width = 2 * reach + 1
    if len(finite) < width + 1:
        raise ValueError(
            f"the range test diverged after {len(finite)} steps, at a rate of {rates[len(finite) - 1]:.2g}"
        )
    smooth = np.convolve(finite, np.full(width, 1 / width), "valid")
    if kind.endswith("tenth"):
        return rates[reach + int(smooth.argmin())] / 10
    return rates[reach + int(np.gradient(smooth).argmin())]


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_optimizer(kind: str, model: GPT, config: Config) -> tuple[Optimizer, Callable[[int], float]]:
    """Build the optimizer with AdamW's parameter groups, weight decay and betas.

    Returns:
        The optimizer, and the schedule: the factor on its learning rate by step.

    Raises:
        ImportError: The package of the optimizer is not installed.
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

        # Recommended by its authors for transformers with warm-up (arXiv 2306.06101, README of the package).
        options = {"safeguard_warmup": True, "use_bias_correction": True}
        return Prodigy(groups, lr=settings.lr, betas=betas, eps=settings.adam_eps, **options), schedule
    from schedulefree import AdamWScheduleFree

    # It has a warm-up of its own, and its average of the weights replaces a decay (arXiv 2405.15682).
    optimizer = AdamWScheduleFree(
        groups, lr=settings.lr, betas=betas, eps=settings.adam_eps, warmup_steps=settings.lr_warmup_iters
    )
    return optimizer, lambda step: 1.0


def train_step(model: GPT, optimizer: Optimizer, micro_batches: MicroBatches, clip: float) -> float:
    """Train one step and return the mean loss of its micro-batches."""
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
def evaluate(model: GPT, optimizer: Optimizer, evaluation: Evaluation) -> float:
    """Return the mean loss over the validation batches."""
    set_mode(optimizer, "eval")
    model.eval()
    losses: list[float] = [
        model(torch.from_numpy(batch)).item() for batches in evaluation.steps() for batch in batches
    ]
    model.train()
    return sum(losses) / len(losses)


def set_mode(optimizer: Optimizer, mode: str) -> None:
    """Switch a schedule-free optimizer between the weights for training ("train") and evaluation ("eval")."""
    switch = getattr(optimizer, mode, None)
    if switch:
        switch()


def loader(dataset: SampleDataset, config: Config) -> BatchLoader:
    """Return the batches of a run of one process."""
    return BatchLoader(dataset, config.training.micro_batch_size, 0, 1, config.micro_batches_per_step(1))


def train_record(
    step: int,
    loss: float,
    optimizer: Optimizer,
    config: Config,
    seconds: float,
    discarded: int = 0,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Return the record of a step.

    Args:
        step: Number of the step.
        loss: Its loss.
        optimizer: Its learning rate is recorded.
        config: Configuration of the run.
        seconds: Duration of the step.
        discarded: Number of steps of the range test before.
        scale: Factor of the range test on the configured rate.
    """
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


def event_record(event: str, step: int, discarded: int = 0) -> dict[str, Any]:
    """Return the record of the start or the end of the run."""
    return {"event": event, "step": step, "total_steps": discarded + step}


if __name__ == "__main__":
    sys.exit(main())
