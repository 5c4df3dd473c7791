#!/usr/bin/env python3
"""Train the configured model in a plain PyTorch loop, with an optimizer that brings its own idea of the learning rate.

    python tools/reproduction/peers.py --optimizer schedulefree --config run.yaml --run-dir runs/peer

The weights, the batches and their order, warm-up, schedule, clipping and evaluation are those of pretrain_gpt.py with
the same configuration: with `--optimizer adamw` so are the losses. One process, fp32.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_adalrs import build
from megatron_adalrs.arguments import config_from_values, load_yaml
from megatron_adalrs.config import Config
from megatron_adalrs.data.loader import BatchLoader
from megatron_adalrs.metrics import JsonLines, Metrics, perplexity
from megatron_adalrs.model.gpt import GPT, count_parameters, initialise
from megatron_adalrs.optim import build_optimizer
from megatron_adalrs.schedule import build_schedule
from megatron_adalrs.trainer import Evaluation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=["adamw", "prodigy", "schedulefree"], required=True)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, as pretrain_gpt.py takes it")
    parser.add_argument("--run-dir", type=Path, required=True, help="where metrics.jsonl is written")
    options = parser.parse_args()
    try:
        config = config_from_values(load_yaml(options.config) | {"run_dir": str(options.run_dir)})
        train(config, options.optimizer)
    except ImportError as error:
        print(f"error: --optimizer {options.optimizer}: {error}: pip install 'megatron-adalrs[peers]'", file=sys.stderr)
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
    config = build.with_run_dir(config)
    vocab_size = build.resolve_vocab_size(config)
    torch.manual_seed(config.training.seed)
    model = GPT(config.model, vocab_size)
    initialise(model, config.model, config.training.seed)
    optimizer, schedule = make_optimizer(kind, model, config)
    size = config.global_batch_size(1)
    train_set, valid_set, _ = build.build_datasets(config, size)
    build.write_config(config)
    metrics = Metrics([JsonLines(config.run.run_dir / "metrics.jsonl", frozenset({"train", "eval", "run"}))])
    metrics.write("run", event_of("start", 0) | {"parameters": count_parameters(config.model, vocab_size)})
    iters, every = config.training.train_iters, config.run.eval_interval
    with loader(train_set, config) as batches, loader(valid_set, config) as held_out:
        passes = build.batches_in_one_pass(valid_set, config.run.eval_iters, size)
        evaluation = Evaluation("valid", held_out, passes)
        for step in range(iters):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = config.optimizer.lr * schedule(step)
            loss = train_step(model, optimizer, batches.micro_batches(step * size), config.optimizer.clip_grad)
            metrics.write("train", train_record(step + 1, loss, optimizer, config, time.perf_counter() - started))
            if step + 1 == iters or (every and (step + 1) % every == 0):
                loss = evaluate(model, optimizer, evaluation)
                place = {"split": "valid", "step": step + 1, "total_steps": step + 1}
                metrics.write("eval", place | {"loss": loss, "perplexity": perplexity(loss)})
    metrics.write("run", event_of("end", iters))
    metrics.close()


def make_optimizer(kind: str, model: GPT, config: Config) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """The optimizer, with AdamW's groups, decay and betas, and the factor on its rate at each step.

    Raises:
        ImportError: the package is not installed.
    """
    settings = config.optimizer
    plain = build_optimizer(model, settings)
    schedule = build_schedule(config)
    if kind == "adamw":
        return plain, schedule
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in plain.param_groups]
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
    if dataset is None:
        raise ValueError(f"split: {config.data.split!r} leaves nothing to validate on")
    return BatchLoader(dataset, config.training.micro_batch_size, 0, 1, config.micro_batches_per_step(1))


def train_record(step: int, loss: float, optimizer: torch.optim.Optimizer, config: Config, seconds: float) -> dict:
    tokens = config.global_batch_size(1) * config.model.seq_length
    return {
        "step": step, "total_steps": step, "loss": loss, "lr": optimizer.param_groups[0]["lr"], "scale": 1.0,
        "phase": "fixed", "seconds": seconds, "consumed_tokens": step * tokens, "discarded_tokens": 0,
    }  # fmt: skip


def event_of(event: str, step: int) -> dict:
    return {"event": event, "step": step, "total_steps": step}


if __name__ == "__main__":
    sys.exit(main())
