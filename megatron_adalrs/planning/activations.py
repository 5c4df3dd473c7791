"""Memory of activations saved for the backward pass, and of temporaries of both passes.

The formulas count the tensors that autograd saves for the modules of `model/` and `parallel/`, each storage
once. Symbols: b = micro batch, s = tokens of a sequence on this rank outside attention, r = the same in the
residual stream (with sequence parallelism s / tensor ranks), h = hidden size, q and kv = features of this
rank's query and key (or value) heads, f = its part of the MLP's width, rows = its part of the padded
vocabulary. Source of the method: Korthikanti et al. (arXiv 2205.05198, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import MeshShape
from megatron_adalrs.parallel.cross_entropy import CHUNK_ELEMENTS

FLOAT = 4


def bytes_of_element(config: Config) -> int:
    """Return the size in bytes of an element of weights, gradients and activations."""
    return FLOAT if config.training.precision == "fp32" else 2


@dataclass(frozen=True)
class Activations:
    """Memory of one micro-batch on one rank, in bytes."""

    residual: int
    """One tensor [b, r, h] of the residual stream."""
    block: int
    """Saved by each block."""
    rerun: int
    """Recomputed in a block's backward pass, beyond what was saved."""
    backward: int
    """Gradients of activations that are alive at one time in a block's backward pass."""
    embedding: int
    """Saved by the embedding: token ids, dropout mask, and without a pipeline the document mask."""
    output: int
    """Saved by the final norm and the loss, including the gradients that the loss computes in its forward."""
    loss: int
    """Temporaries of the loss: a chunk of logits, and gradients before rounding."""


def activations_of(config: Config, vocab_size: int, shape: MeshShape, on_cpu: bool) -> Activations:
    """Return the sizes for one micro-batch.

    Args:
        vocab_size: Size of the vocabulary without padding.
        on_cpu: Ranks compute on CPUs, whose RMSNorm and dropout kernels are less fused and save more.
    """
    model, b = config.model, config.training.micro_batch_size
    unit = bytes_of_element(config)
    s = model.seq_length // shape.context
    r = s // shape.tensor if config.parallel.sequence_parallel else s
    residual = b * r * model.hidden_size * unit
    norm_kept = _kept_by_norm(config, b * r, on_cpu)
    mask = b * r * model.hidden_size * (unit if on_cpu else 1) if model.hidden_dropout else 0
    core_input, core = _kept_by_attention(config, shape, b * s, on_cpu)
    width = b * s * model.mlp_size // shape.tensor * unit
    mlp = (4 if model.swiglu else 2) * width
    whole_block = 2 * norm_kept + 2 * b * s * model.hidden_size * unit + core + mlp + 2 * mask
    granularity = config.training.recompute_granularity
    kept = {None: whole_block, "full": residual, "selective": whole_block - core + core_input}[granularity]
    # The document mask is computed once for all blocks; in a pipeline each block computes its own.
    documents = b * model.seq_length**2 * unit if config.data.reset_attention_mask else 0
    in_blocks = documents if shape.pipe > 1 else 0
    return Activations(
        residual=residual,
        block=kept + in_blocks,
        rerun=whole_block - kept,
        backward=2 * residual + width,
        embedding=b * s * 8 + mask + documents - in_blocks,
        output=norm_kept + _kept_by_loss(config, vocab_size, shape, b * s),
        loss=_temporaries_of_loss(config, vocab_size, shape, b * s),
    )


def _kept_by_norm(config: Config, tokens: int, on_cpu: bool) -> int:
    elements = tokens * config.model.hidden_size
    if config.model.normalization == "RMSNorm" and on_cpu:
        # Unfused: the input and the normalized input in fp32, and the root mean square.
        return 2 * elements * FLOAT + tokens * FLOAT
    return elements * bytes_of_element(config) + 2 * tokens * FLOAT


def _kept_by_attention(config: Config, shape: MeshShape, tokens: int, on_cpu: bool) -> tuple[int, int]:
    """Return the bytes saved between the two projections, with and without recomputation of the core.

    Inside attention, a rank of the context axis has all tokens for a part of the heads, which is the same
    number of elements. If the axis does not divide the key-value heads, they are repeated first.

    Args:
        tokens: b x s of this rank outside attention.
    """
    model, unit = config.model, bytes_of_element(config)
    heads, groups = model.num_attention_heads // shape.tensor, model.num_key_value_heads // shape.tensor
    if groups % shape.context:
        groups = heads
    q, kv = tokens * heads * model.head_dim, tokens * groups * model.head_dim
    joined = q + 2 * kv  # one storage, of which q, k and v are views
    rotated, repeated = model.position_embedding_type == "rope", groups != heads
    if rotated and repeated:
        attended = 3 * q
    elif rotated:
        attended = q + kv + joined  # v stays a view
    elif repeated:
        attended = joined + 2 * q  # q stays a view
    else:
        attended = joined
    # The input of the output projection is the output of attention, exchanged among the context ranks.
    result = q if shape.context == 1 else 2 * q
    if model.attention_dropout and on_cpu:
        # Unfused: probabilities, mask, their product and the inputs, in fp32.
        scores = tokens * (heads // shape.context) * model.seq_length * shape.context
        core = FLOAT * 3 * (q + scores) + result * unit
    else:
        core = (attended + result) * unit + tokens * heads * FLOAT  # the normalizers of the softmax
    return (joined + q) * unit, core


def _kept_by_loss(config: Config, vocab_size: int, shape: MeshShape, tokens: int) -> int:
    """Return the size of the gradients that the fused loss computes in its forward pass."""
    h, unit = config.model.hidden_size, bytes_of_element(config)
    rows = config.model.padded_vocab_size(vocab_size, shape.tensor) // shape.tensor
    # In fp16 the gradient of the weight is rounded only in the backward pass.
    return tokens * h * unit + rows * h * (FLOAT if config.training.fp16 else unit)


def _temporaries_of_loss(config: Config, vocab_size: int, shape: MeshShape, tokens: int) -> int:
    h, precision = config.model.hidden_size, config.training.precision
    rows = config.model.padded_vocab_size(vocab_size, shape.tensor) // shape.tensor
    chunk = min(tokens, max(1, CHUNK_ELEMENTS // rows)) * min(rows, vocab_size)
    hidden = tokens * h * bytes_of_element(config)
    if precision == "fp32":
        return hidden + FLOAT * chunk
    # Logits and their gradient in both precisions, and the weight gradient of a chunk. In bf16 the rounded
    # gradient counts as saved and exists beside the one in fp32.
    return hidden + (FLOAT + 2) * chunk + (FLOAT if precision == "bf16" else 2) * rows * h
