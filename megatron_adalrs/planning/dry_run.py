"""`--dry-run`: what a run would be, without its ranks, its memory or its data."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_adalrs.config import Config
from megatron_adalrs.data.vocabulary import known_vocabulary, resolve_vocabulary
from megatron_adalrs.distributed.process_mesh import MeshShape
from megatron_adalrs.engine import computes_on_cpu
from megatron_adalrs.model.gpt import count_parameters
from megatron_adalrs.planning import describe, plan_run
from megatron_adalrs.utils.format import quantity


def dry_run(config: Config) -> str:
    """The plan of the run that `config` describes, on `--world-size` ranks or the launcher's.

    Joins no process group and writes nothing. A corpus that is not there is noted, not refused.

    Raises:
        ValueError: what a run would refuse of its configuration, vocabulary and mesh.
    """
    world_size = config.run.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    shape = MeshShape.of_world(world_size, **config.parallel.sizes)
    missing = [corpus.prefix for corpus in config.data.corpora if not Path(f"{corpus.prefix}.idx").exists()]
    vocab_size = (known_vocabulary if missing else resolve_vocabulary)(config).size
    plan = plan_run(config, vocab_size, shape, computes_on_cpu())
    lines = [
        f"dry run: {quantity(count_parameters(config.model, vocab_size), 'parameters')} on "
        f"{shape.world_size} rank(s), "
        f"ZeRO-{config.training.zero_stage}, {config.training.precision}",
        describe(plan),
    ]
    lines += [f"data_path: there is no {prefix}.idx yet; a run needs it" for prefix in missing]
    return "\n".join(lines)
