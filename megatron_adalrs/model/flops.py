"""Floating-point operations of training."""

from __future__ import annotations

from megatron_adalrs.config import ModelConfig


def flops_per_token(config: ModelConfig, parameters: int, padded_vocab_size: int) -> float:
    """Return the operations of one token's forward and backward pass, without recomputation.

    They are 6 per weight in a matrix product, plus 12 layers x heads x head size x sequence length for
    attention scores and values (PaLM, arXiv 2204.02311, appendix B). Embedding tables count only if they are
    also the output matrix.

    Args:
        config: the shape of the model.
        parameters: number of parameters, with padding of the vocabulary.
        padded_vocab_size: rows of the embedding table.
    """
    lookup_parameters = 0
    if config.position_embedding_type == "learned_absolute":
        lookup_parameters += config.max_positions * config.hidden_size
    if config.untie_embeddings_and_output_weights:
        lookup_parameters += padded_vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.num_attention_heads * config.head_dim * config.seq_length
    return 6.0 * (parameters - lookup_parameters) + attention
