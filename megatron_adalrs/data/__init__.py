"""Tokenizers, the Megatron indexed dataset, fixed-length samples over it, and a resumable loader."""
