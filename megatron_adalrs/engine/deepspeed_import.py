"""Import of DeepSpeed without its banner and without the deprecation warnings that its import causes.

The package's `__init__` imports this module before any other module of the package.
"""

from __future__ import annotations

import logging
import warnings

# Neither the banner nor DeepSpeed's use of collectives that torch has renamed is of use to a user.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)

import deepspeed  # noqa: E402, F401 (imported for its side effects, after the two lines above)

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def show_library_messages(verbose: bool) -> None:
    """Show the log messages and warnings of DeepSpeed and PyTorch, or only their errors."""
    for name in ("DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)
    if not verbose:
        warnings.filterwarnings("ignore", module=r"(torch|deepspeed)(\.|$)")
