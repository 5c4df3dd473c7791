"""megatron_adalrs: GPT pretraining on DeepSpeed in which the learning rate finds itself (AdaLRS, arXiv 2506.13274)."""

__version__ = "0.1.0"
