"""Bytes that the forward pass keeps for the backward pass, and the temporaries of both.

Every number counts the tensors that the modules of `model/` and `parallel/` make autograd keep, each storage
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
    """Of weights, gradients and activations."""
    return FLOAT if config.training.precision == "fp32" else 2


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank."""

    residual: int
    """One [b, r, h]: what passes from block to block, and from stage to stage."""
    block: int
    """What each block keeps."""
    rerun: int
    """What a block's backward pass makes anew with recomputation, beyond what was kept."""
    backward: int
    """Gradients of activations that are alive at once in a block's backward pass."""
    embedding: int
    """What the embedding keeps: token numbers, a dropout mask, and outside a pipe the mask of documents."""
    output: int
    """What the final norm and the loss keep, the gradients that the loss makes in the forward pass
    included."""
    loss: int
    """Temporaries of the loss: a chunk of logits, and gradients before they are rounded."""


def activations_of(config: Config, vocab_size: int, shape: MeshShape, on_cpu: bool) -> Activations:
    """Sizes for one micro-batch.

    Args:
        vocab_size: before padding.
        on_cpu: torch's CPU kernels are less fused: RMSNorm and dropout keep more.
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
    # The mask of documents is made once, and kept by all blocks; in a pipe each block makes its own.
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
        # Not fused: the input and the normalised input, in fp32, and the root.
        return 2 * elements * FLOAT + tokens * FLOAT
    return elements * bytes_of_element(config) + 2 * tokens * FLOAT


def _kept_by_attention(config: Config, shape: MeshShape, tokens: int, on_cpu: bool) -> tuple[int, int]:
    """Bytes kept between the two projections: with its core recomputed, and without.

    Tokens: b x s of this rank outside attention. In it a rank of the context axis has all tokens for a part
    of the heads, as many elements; where the axis does not divide the key-value heads, they are repeated
    first.
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
    # The output projection's input is attention's output, or what the context ranks trade it for.
    result = q if shape.context == 1 else 2 * q
    if model.attention_dropout and on_cpu:
        # No fused kernel: probabilities, mask and product, and the inputs, in fp32.
        scores = tokens * (heads // shape.context) * model.seq_length * shape.context
        core = FLOAT * 3 * (q + scores) + result * unit
    else:
        core = (attended + result) * unit + tokens * heads * FLOAT  # the softmax's normalisers
    return (joined + q) * unit, core


def _kept_by_loss(config: Config, vocab_size: int, shape: MeshShape, tokens: int) -> int:
    """The gradients of hidden states and weight that the fused loss makes in the forward pass."""
    h, unit = config.model.hidden_size, bytes_of_element(config)
    rows = config.model.padded_vocab_size(vocab_size, shape.tensor) // shape.tensor
    # In fp16 the weight's is rounded in the backward pass only.
    return tokens * h * unit + rows * h * (FLOAT if config.training.fp16 else unit)


def _temporaries_of_loss(config: Config, vocab_size: int, shape: MeshShape, tokens: int) -> int:
    h, precision = config.model.hidden_size, config.training.precision
    rows = config.model.padded_vocab_size(vocab_size, shape.tensor) // shape.tensor
    chunk = min(tokens, max(1, CHUNK_ELEMENTS // rows)) * min(rows, vocab_size)
    hidden = tokens * h * bytes_of_element(config)
    if precision == "fp32":
        return hidden + FLOAT * chunk
    # Logits and their gradient in both precisions, and a chunk's part of the weight's gradient; in bf16 the
    # rounded one is counted as kept, and lies beside the one in fp32.
    return hidden + (FLOAT + 2) * chunk + (FLOAT if precision == "bf16" else 2) * rows * h
