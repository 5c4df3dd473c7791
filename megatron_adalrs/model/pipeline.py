"""GPT as a list of pipeline layers: the same modules, called in order by the stages that hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.model.document_mask import NO_ATTENTION_INPUTS, NO_DOCUMENT_MASKING, DocumentMasking
from megatron_adalrs.model.gpt import Block, Embedding, build_norm, next_token_loss
from megatron_adalrs.model.rotary_embedding import Rotary
from megatron_adalrs.parallel.layers import ColumnParallelLinear, VocabularyParallelEmbedding
from megatron_adalrs.parallel.layout import ONE_PROCESS_LAYOUT, Layout


@dataclass(frozen=True)
class PipelineLayer:
    """A layer that is built by the stage it is assigned to."""

    name: str
    """Path of the module in GPT, which gives its parameters the same names."""
    build: Callable[[], nn.Module]
    tied_weight: str | None = None
    """Path within the layer of the weight that the first and the last layer share, if any."""


Activations = Tensor | tuple[Tensor, Tensor]
"""[b, s, h], or the tensor rank's part; with document ids, int32 [b, s], if blocks need them."""


class PipelineEmbedding(Embedding):
    """The embedding layer, which passes document ids on to the blocks with its activations."""

    def __init__(
        self, config: ModelConfig, padded_vocab_size: int, layout: Layout, documents: DocumentMasking
    ) -> None:
        super().__init__(config, padded_vocab_size, layout)
        self.documents = documents

    def forward(self, tokens: Tensor) -> Activations:  # type: ignore[override]  # a pipeline layer's types
        """Embed tokens [b, s], int64, and compute their document ids if blocks need them."""
        if not self.documents.needs_document_ids:
            return super().forward(tokens)
        document_ids = self.documents.document_ids(tokens)
        return super().forward(tokens, self.documents.positions_of(document_ids)), document_ids


class PipelineBlock(Block):
    """A block that has its own reference to the rotary table.

    Only activations pass from layer to layer, and document ids as far as the last block.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        rotary: Rotary | None,
        documents: DocumentMasking,
        is_last: bool,
    ) -> None:
        super().__init__(config, layout)
        self.rotary = rotary
        self.documents = documents
        self.is_last = is_last

    def forward(self, inputs: Activations) -> Activations:  # type: ignore[override]  # a pipeline layer's types
        """Apply the block to activations; the last block drops their document ids."""
        if isinstance(inputs, Tensor):
            return super().forward(inputs, self.rotary, NO_ATTENTION_INPUTS)
        x, document_ids = inputs
        x = super().forward(x, self.rotary, self.documents.attention_inputs(document_ids, x.dtype))
        return x if self.is_last else (x, document_ids)


class _Output(nn.Module):
    """The last layer. The output matrix is applied in the loss function, which fuses the two."""

    weight: Tensor  # [padded vocabulary / tensor ranks, h]
    vocab_size: int  # before padding
    layout: Layout
    masked = False
    """Whether targets may be IGNORE_INDEX."""
    scale = 1.0
    """Factor of the loss, which the engine sets if not every token counts."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x: the output matrix is applied in `loss`."""
        return x

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the mean next-token loss.

        Args:
            x: final hidden states, [b, s, h] or the tensor rank's part.
            targets: [b, s], int64.
        """
        loss = next_token_loss(x, targets, self.weight, self.vocab_size, self.layout, self.masked)
        return loss * self.scale if self.masked else loss


class Output(_Output, ColumnParallelLinear):
    """The last layer with an output matrix of its own."""

    def __init__(self, config: ModelConfig, vocab_size: int, layout: Layout) -> None:
        super().__init__(
            config.hidden_size, config.padded_vocab_size(vocab_size, layout.tensor.size), False, layout
        )
        self.vocab_size = vocab_size
        self.layout = layout


class TiedOutput(_Output, VocabularyParallelEmbedding):
    """The last layer with the last stage's copy of the token embedding."""

    def __init__(self, config: ModelConfig, vocab_size: int, layout: Layout) -> None:
        super().__init__(config.padded_vocab_size(vocab_size, layout.tensor.size), config.hidden_size, layout)
        self.vocab_size = vocab_size
        self.layout = layout


def pipeline_layers(
    config: ModelConfig,
    vocab_size: int,
    layout: Layout = ONE_PROCESS_LAYOUT,
    documents: DocumentMasking = NO_DOCUMENT_MASKING,
) -> list[PipelineLayer]:
    """Return GPT's layers in order: embedding, blocks, final norm, output.

    Args:
        config: the shape of the model.
        vocab_size: size of the vocabulary before padding.
        layout: layout over the stage's tensor ranks; a pipeline has no context axis.
        documents: what an end-of-document token resets.
    """
    rotary = Rotary.of(config)  # one table for all blocks of a stage
    build_block = partial(PipelineBlock, config, layout, rotary, documents)
    last = config.num_layers - 1
    blocks = [PipelineLayer(f"blocks.{i}", partial(build_block, i == last)) for i in range(config.num_layers)]
    final_norm = PipelineLayer("final_norm", partial(build_norm, config, layout))
    padded_vocab_size = config.padded_vocab_size(vocab_size, layout.tensor.size)
    build_embedding = partial(PipelineEmbedding, config, padded_vocab_size, layout, documents)
    if config.untie_embeddings_and_output_weights:
        embedding = PipelineLayer("embedding", build_embedding)
        output = PipelineLayer("output", partial(Output, config, vocab_size, layout))
    else:
        embedding = PipelineLayer("embedding", build_embedding, tied_weight="tokens.weight")
        output = PipelineLayer(
            "embedding.tokens", partial(TiedOutput, config, vocab_size, layout), tied_weight="weight"
        )
    return [embedding, *blocks, final_norm, output]


class StageModules(nn.Module):
    """The layers of a pipeline stage under GPT's names, for functions that take a GPT's parameters."""

    def __init__(self, layers: Mapping[str, nn.Module], vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        for path, layer in layers.items():
            *parents, name = path.split(".")
            module: nn.Module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            module.add_module(name, layer)
