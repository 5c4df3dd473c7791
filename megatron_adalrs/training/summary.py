"""The last lines of a run."""

from __future__ import annotations

from megatron_adalrs.checkpoint.train_state import TrainState, count_samples
from megatron_adalrs.config import Config
from megatron_adalrs.utils.format import quantity


def summary(config: Config, state: TrainState, global_batch_size: int, scale: float, saved: bool) -> str:
    """What a run came to: what bad numbers cost, what the search found and what that cost.

    Args:
        scale: what AdaLRS multiplied the learning rate by.
        saved: whether there is a checkpoint of the end.
    """
    where = f"checkpoint in {config.run.save}" if saved else "without a checkpoint of the end"
    lines = [f"done: {state.step} steps, {where}"]
    if state.skipped_samples:
        batches = count_samples(state.skipped_samples) // global_batch_size
        lines.append(f"bad numbers: {state.guard_undone_steps} steps undone, {batches} batches passed over")
    if config.adalrs.enabled:
        lr, tokens = config.optimizer.lr, global_batch_size * config.model.seq_length
        discarded = state.discarded_steps - state.guard_undone_steps
        kept, gone = (quantity(steps * tokens, "token") for steps in (state.step, discarded))
        lines += [
            f"AdaLRS took the base learning rate from {lr:g} to {lr * scale:.4g} (x {scale:.4g})",
            f"it cost {discarded} discarded steps ({discarded / state.total_steps:.1%} of all; {gone} beside "
            f"{kept} "
            f"kept) and {state.snapshot_seconds:.1f} s of snapshots",
        ]
    return "\n".join(lines)
