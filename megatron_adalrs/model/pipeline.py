"""GPT as a list of pipeline layers: the same parts, called one after the other by whichever stage holds
them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.model.document_mask import NO_ATTENTION_INPUTS, NO_DOCUMENT_MASKING, DocumentMasking
from megatron_adalrs.model.gpt import Block, Embedding, next_token_loss, norm
from megatron_adalrs.model.rotary_embedding import Rotary
from megatron_adalrs.parallel.layers import ColumnParallelLinear, VocabularyParallelEmbedding
from megatron_adalrs.parallel.layout import ONE_PROCESS_LAYOUT, Layout


@dataclass(frozen=True)
class PipelineLayer:
    """One layer, to be built by the stage that gets it."""

    name: str
    """Where GPT has this module, so that its parameters go by the same names."""
    build: Callable[[], nn.Module]
    tied_weight: str | None = None
    """Path within the layer of the weight that the first and the last layer share."""


Activations = Tensor | tuple[Tensor, Tensor]
"""[b, s, h], or the tensor rank's part; where blocks need to know of documents, with their numbers, int32 [b,
s]."""


class PipelineEmbedding(Embedding):
    """The embedding that sends the numbers of documents down the pipe with its activations."""

    def __init__(
        self, config: ModelConfig, padded_vocab_size: int, layout: Layout, documents: DocumentMasking
    ) -> None:
        super().__init__(config, padded_vocab_size, layout)
        self.documents = documents

    def forward(self, tokens: Tensor) -> Activations:  # type: ignore[override]
        if not self.documents.marks_tokens:
            return super().forward(tokens)
        numbers = self.documents.document_ids(tokens)
        return super().forward(tokens, self.documents.positions_of(numbers)), numbers


class PipelineBlock(Block):
    """A block that knows its rotary table, since activations are all that travels down the pipe, and with
    them, to the last block, the numbers of documents."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        rotary: Rotary | None,
        documents: DocumentMasking,
        is_last: bool,
    ) -> None:
        super().__init__(config, layout)
        self.rotary, self.documents, self.is_last = rotary, documents, is_last

    def forward(self, inputs: Activations) -> Activations:  # type: ignore[override]
        if isinstance(inputs, Tensor):
            return super().forward(inputs, self.rotary, NO_ATTENTION_INPUTS)
        x, numbers = inputs
        x = super().forward(x, self.rotary, self.documents.marks(numbers, x.dtype))
        return x if self.is_last else (x, numbers)


class _Output(nn.Module):
    """The pipe's end. The output matrix is used within the loss, which is never told apart from it."""

    weight: Tensor  # [padded vocabulary / tensor ranks, h]
    vocab_size: int  # before padding
    layout: Layout
    masked = False
    """Whether there may be targets that do not count."""
    scale = 1.0
    """Of the loss: the engine sets it where not every token counts."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token loss of final hidden states, [b, s, h] or the tensor rank's part; targets: [b, s],
        int64."""
        loss = next_token_loss(x, targets, self.weight, self.vocab_size, self.layout, self.masked)
        return loss * self.scale if self.masked else loss


class Output(_Output, ColumnParallelLinear):
    """An output matrix of its own."""

    def __init__(self, config: ModelConfig, vocab_size: int, layout: Layout) -> None:
        super().__init__(
            config.hidden_size, config.padded_vocab_size(vocab_size, layout.tensor.size), False, layout
        )
        self.vocab_size, self.layout = vocab_size, layout


class TiedOutput(_Output, VocabularyParallelEmbedding):
    """The last stage's copy of the token embedding."""

    def __init__(self, config: ModelConfig, vocab_size: int, layout: Layout) -> None:
        super().__init__(config.padded_vocab_size(vocab_size, layout.tensor.size), config.hidden_size, layout)
        self.vocab_size, self.layout = vocab_size, layout


def pipeline_layers(
    config: ModelConfig,
    vocab_size: int,
    layout: Layout = ONE_PROCESS_LAYOUT,
    documents: DocumentMasking = NO_DOCUMENT_MASKING,
) -> list[PipelineLayer]:
    """Embedding, blocks, final norm, output: what GPT does with tokens [b, s], in its order.

    Args:
        vocab_size: before padding.
        layout: of the stage's tensor ranks; a pipe has no context axis.
    """
    rotary = Rotary.of(config)  # one table for all blocks of a stage
    build_block = partial(PipelineBlock, config, layout, rotary, documents)
    last = config.num_layers - 1
    blocks = [PipelineLayer(f"blocks.{i}", partial(build_block, i == last)) for i in range(config.num_layers)]
    final_norm = PipelineLayer("final_norm", partial(norm, config, layout))
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


def arranged_as_gpt(layers: Mapping[str, nn.Module], vocab_size: int) -> nn.Module:
    """A container that holds a stage's layers where GPT has them: `initialise` treats it as one."""
    root = nn.Module()
    root.vocab_size = vocab_size
    for name, layer in layers.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, layer)
    return root
