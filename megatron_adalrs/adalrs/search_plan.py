"""Plan of a search in a given run, in steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SearchPlan:
    """Plan of a paper-mode search, in kept steps."""

    window: int
    """Length of a window and of a trial."""
    search_start: int
    """First step at which a trial may start or the rate be cut."""
    search_end: int
    """Last step at which a trial may end or the rate be cut."""
    train_iters: int
    """Length of the run."""
    backtrack: bool = True
    """True if trials can be undone."""

    @property
    def live_snapshots(self) -> int:
        """Largest number of snapshots held at a time."""
        return int(self.backtrack)

    @property
    def most_in_trials(self) -> int:
        """Number of steps discarded if every possible trial is undone."""
        return (self.search_end - self.search_start) // self.window * self.window if self.backtrack else 0

    @property
    def watch_start(self) -> int:
        """Step at which the first window begins: two windows end at `search_start`."""
        return self.search_start - 2 * self.window

    def __str__(self) -> str:
        return (
            f"searches from step {self.search_start} to {self.search_end} in windows of {self.window} steps"
        )


@dataclass(frozen=True)
class RacePlan:
    """Plan of the races of robust mode, in kept steps."""

    climb_start: int
    """Step at which the climb begins; `search_start` where there is none."""
    climb_steps: int
    """Length of each arm of the climb's races."""
    search_start: int
    """Step at which the first full race begins."""
    search_end: int
    """Last step at which a race may end."""
    trial_steps: int
    """Steps of a trial at the raised rate."""
    return_steps: int
    """Steps of a trial at the old rate, after those at the raised rate."""
    skipped_steps: int
    """Number of first return steps that the verdict leaves out."""
    restart_steps: int
    """Steps over which a restart is compared."""
    restart_skipped_steps: int
    """Number of first restart steps that the verdict leaves out."""
    train_iters: int
    """Length of the run."""
    warmup_iters: int = 0
    """Length of the warm-up."""

    live_snapshots = 4
    """Largest number of snapshots held at a time: the initial weights, a race's start, its control, and a
    restart."""

    @property
    def race_steps(self) -> int:
        """Length of each arm of a race."""
        return self.trial_steps + self.return_steps

    @property
    def climb_judged(self) -> int:
        """Number of last steps of a climb's arms that its verdict uses."""
        return self.climb_steps // 2

    @property
    def most_climbs(self) -> int:
        """Largest number of races of the climb."""
        return (self.search_start - self.climb_start) // self.climb_steps

    @property
    def restart_cost(self) -> int:
        """Largest number of steps that a restart race discards, with the control of the race before it."""
        return self.search_start + self.race_steps + 2 * self.restart_steps

    def __str__(self) -> str:
        climb = f"climbs from step {self.climb_start} on in races of {self.climb_steps} steps per arm, "
        return (
            f"{climb if self.most_climbs else ''}races scales from step {self.search_start} to "
            f"{self.search_end}, {self.race_steps} steps per arm"
        )
