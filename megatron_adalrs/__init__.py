"""GPT pretraining on DeepSpeed with the AdaLRS learning-rate search (arXiv 2506.13274)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_adalrs.integrations.torch_loop import AdaLRS

__all__ = ["AdaLRS", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `AdaLRS` on first use, so that importing the package does not import torch."""
    if name == "AdaLRS":
        from megatron_adalrs.integrations.torch_loop import AdaLRS

        return AdaLRS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
