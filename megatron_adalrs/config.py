"""The configuration: frozen models that are the one source of flags, YAML keys, defaults, help texts and checks.

Every field is a command-line flag (`num_layers` -> `--num-layers`) and a YAML key of the same name; the AdaLRS settings
carry the prefix `adalrs.`. `arguments.py` reads them; everything else only takes what it uses. No torch in here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from megatron_adalrs.adalrs.settings import AdaLRSSettings

PresetName = Literal[
    "gpt2-tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl",
    "llama-tiny", "llama3.2-1b", "llama3.2-3b", "llama3.1-8b",
    "qwen2-tiny", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b",
]  # fmt: skip
Fraction = Annotated[float, Field(ge=0, lt=1)]
DecayShape = Literal["linear", "cosine", "exponential", "minus_sqrt"]


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(_Group):
    """Model shape."""

    preset: PresetName | None = None
    """A published shape, or a tiny one of its family, as defaults for the fields below."""
    num_layers: PositiveInt
    """Number of transformer blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_attention_heads: PositiveInt
    """Number of query heads."""
    num_query_groups: PositiveInt | None = None
    """Number of key-value heads (grouped-query attention). Default: num_attention_heads."""
    kv_channels: PositiveInt | None = None
    """Size of one head. Default: hidden_size / num_attention_heads."""
    ffn_hidden_size: PositiveInt | None = None
    """Width inside the MLP. Default: 4 hidden_size, with --swiglu 8/3 hidden_size rounded down to a multiple of 64."""
    seq_length: PositiveInt
    """Tokens in one sample."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence that learned positions can represent. Default: seq_length."""
    vocab_size: PositiveInt | None = None
    """Vocabulary size before padding. Default: the tokenizer's, else the one noted beside the data."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The vocabulary is padded up to a multiple of this."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of normalisation."""
    norm_epsilon: PositiveFloat = 1e-5
    """Epsilon inside the normalisation."""
    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    """Learned absolute positions, or rotary ones applied to queries and keys."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    swiglu: bool = False
    """Gated SiLU in the MLP in place of GELU."""
    add_bias_linear: bool = True
    """Biases on the linear layers (attention output and MLP; on q, k and v too unless add_qkv_bias says otherwise)."""
    add_qkv_bias: bool | None = None
    """Biases on q, k and v. Default: add_bias_linear. Qwen2 has these and no others."""
    untie_embeddings_and_output_weights: bool = False
    """A separate output matrix, instead of the transposed token embedding."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; residual projections get this / sqrt(2 num_layers)."""
    attention_dropout: Fraction = 0.0
    """Dropout on attention probabilities."""
    hidden_dropout: Fraction = 0.0
    """Dropout on the embeddings and on each residual branch."""

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return max(64, self.hidden_size * 8 // 3 // 64 * 64) if self.swiglu else 4 * self.hidden_size

    @property
    def has_qkv_bias(self) -> bool:
        return self.add_bias_linear if self.add_qkv_bias is None else self.add_qkv_bias

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings or self.seq_length

    def padded_vocab_size(self, vocab_size: int, tensor_parallel_size: int = 1) -> int:
        """`vocab_size` rounded up to a multiple of make_vocab_size_divisible_by x tensor ranks, as Megatron-LM does."""
        multiple = self.make_vocab_size_divisible_by * tensor_parallel_size
        return math.ceil(vocab_size / multiple) * multiple

    @model_validator(mode="after")
    def _sizes_divide(self) -> ModelConfig:
        _require(
            bool(self.kv_channels) or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size: {self.hidden_size} is not divisible by num_attention_heads: {self.hidden_size} = "
            f"{self.hidden_size // self.num_attention_heads} x {self.num_attention_heads} + "
            f"{self.hidden_size % self.num_attention_heads}; change one of them, or give kv_channels",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_query_groups: {self.num_key_value_heads} does not divide num_attention_heads: "
            f"{self.num_attention_heads} = {self.num_attention_heads // self.num_key_value_heads} x "
            f"{self.num_key_value_heads} + {self.num_attention_heads % self.num_key_value_heads}",
        )
        _require(
            self.position_embedding_type != "rope" or self.head_dim % 2 == 0,
            f"kv_channels: rotary positions rotate pairs, so the head size must be even, not {self.head_dim}",
        )
        _require(
            self.max_positions >= self.seq_length,
            f"max_position_embeddings: {self.max_positions} is below seq_length {self.seq_length}",
        )
        return self


class DataConfig(_Group):
    """Data and tokenizer."""

    data_path: str
    """Prefix of the preprocessed corpus: PREFIX.bin and PREFIX.idx, as tools/preprocess_data.py writes them."""
    split: str = "969,30,1"
    """Weights of the train, validation and test parts; whole documents, no overlap."""
    data_cache_path: Path | None = None
    """Folder for the sample indices. Default: a folder `cache` beside the data."""
    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteTokenizer"] | None = None
    """Tokenizer that the data was made with; used for the vocabulary size and its checks. Optional."""
    tokenizer_model: Path | None = None
    """The tokenizer's file (or folder)."""


class OptimizerConfig(_Group):
    """Optimizer and learning-rate schedule. The rate of a step is schedule(step) x lr x AdaLRS scale."""

    lr: PositiveFloat
    """Base (peak) learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Floor of the decay, in the unit of lr; AdaLRS scales it along with lr."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the schedule after the warm-up."""
    lr_decay_iters: PositiveInt | None = None
    """Step at which the decay reaches min_lr. Default: train_iters."""
    lr_warmup_iters: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    lr_wsd_decay_style: DecayShape = "exponential"
    """Shape of the last phase of WSD."""
    lr_wsd_decay_iters: PositiveInt | None = None
    """Length of the last phase of WSD. Default: a tenth of lr_decay_iters."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; not on biases and normalisation weights."""
    adam_beta1: Fraction = 0.9
    """First moment's decay."""
    adam_beta2: Fraction = 0.95
    """Second moment's decay."""
    adam_eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    @model_validator(mode="after")
    def _floor_below_peak(self) -> OptimizerConfig:
        _require(self.min_lr <= self.lr, f"min_lr: {self.min_lr:g} is above lr {self.lr:g}")
        return self


class TrainingConfig(_Group):
    """Length, batch, precision and sharding."""

    train_iters: PositiveInt
    """Optimizer steps to keep; steps of undone AdaLRS trials come on top."""
    micro_batch_size: PositiveInt = 1
    """Samples in one forward pass of one rank."""
    global_batch_size: PositiveInt | None = None
    """Samples in one optimizer step. Default: micro_batch_size x data-parallel ranks."""
    bf16: bool = False
    """Weights and activations in bfloat16, optimizer in fp32. Otherwise everything is fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO: 1 shards the optimizer over data-parallel ranks, 2 gradients too, 3 weights too."""
    deepspeed_config: Path | None = None
    """JSON file with further DeepSpeed settings; a key that contradicts a flag is an error."""
    seed: NonNegativeInt = 1234
    """Seed of the weights, the data order and dropout."""


class ParallelConfig(_Group):
    """Grid of processes: what these leave over of the world is data-parallel."""

    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that the layers are cut into, one rank after the other holding a part of the model."""
    pipeline_partition: Literal["parameters", "uniform"] = "parameters"
    """Stages of about as many parameters each, or of as many layers (embedding, norm and output count as one each)."""
    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every layer's heads and MLP features, and the vocabulary."""
    sequence_parallel: bool = False
    """Split what lies between the tensor-parallel regions (norms, dropout, residual) along the sequence."""


class RunConfig(_Group):
    """Where the run is kept and what it shows."""

    config: Path | None = None
    """YAML file with any of these fields; flags win over it. A run writes its own to <run_dir>/config.yaml."""
    run_dir: Path | None = None
    """Folder of config.yaml, metrics.jsonl, decisions.jsonl, tensorboard/. Default: runs/<date-time>."""
    save: Path | None = None
    """Folder of checkpoints. Default: <run_dir>/checkpoints."""
    load: Path | None = None
    """Resume from the newest checkpoint in this folder (or run directory), or from this very checkpoint."""
    save_interval: PositiveInt | None = None
    """Steps between checkpoints. Default: only at the end and when interrupted."""
    eval_interval: PositiveInt | None = None
    """Steps between evaluations. Default: only at the end."""
    eval_iters: PositiveInt = 100
    """Batches of global_batch_size in one evaluation, at most one pass over the validation part."""
    log_interval: PositiveInt = 10
    """Steps between console lines and TensorBoard points; metrics.jsonl has every step."""
    tensorboard_dir: Path | None = None
    """TensorBoard's folder. Default: <run_dir>/tensorboard."""
    local_rank: int | None = None
    """Passed by the DeepSpeed launcher; the environment decides."""


class Config(_Group):
    """Pretrain a GPT with DeepSpeed; with --adalrs.enabled the learning rate finds itself."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    run: RunConfig = RunConfig()
    adalrs: AdaLRSSettings = AdaLRSSettings()

    @model_validator(mode="after")
    def _schedule_and_search_fit(self) -> Config:
        warmup, decay = self.optimizer.lr_warmup_iters, self.lr_decay_iters
        _require(
            warmup < decay or self.optimizer.lr_decay_style == "constant",
            f"lr_warmup_iters: {warmup} leaves nothing of lr_decay_iters ({decay}) to decay in",
        )
        if self.optimizer.lr_decay_style == "WSD":
            _require(
                warmup + self.lr_wsd_decay_iters <= decay,
                f"lr_wsd_decay_iters: warm-up {warmup} + decay {self.lr_wsd_decay_iters} exceed lr_decay_iters {decay}",
            )
        if self.adalrs.enabled:
            self.adalrs.resolve(self.training.train_iters, warmup)
        return self

    @model_validator(mode="after")
    def _pipeline_fits(self) -> Config:
        stages, zero_stage = self.parallel.pipeline_model_parallel_size, self.training.zero_stage
        if stages == 1:
            return self
        tensor = self.parallel.tensor_model_parallel_size
        _require(
            tensor == 1,
            f"tensor_model_parallel_size: {tensor} does not combine with pipeline_model_parallel_size {stages} yet: "
            "leave one of them at 1",
        )
        _require(
            self.model.num_layers >= stages,
            f"pipeline_model_parallel_size: {stages} stages need a block each, num_layers is {self.model.num_layers}",
        )
        _require(
            zero_stage <= 1,
            f"zero_stage: {zero_stage} shards gradients, which a pipeline accumulates over its micro-batches; "
            f"with pipeline_model_parallel_size {stages} use --zero-stage 0 or 1",
        )
        _require(
            zero_stage == 1 or not self.training.bf16,
            f"zero_stage: {zero_stage} with bf16 and pipeline_model_parallel_size {stages} makes checkpoints that "
            "DeepSpeed cannot load; use --zero-stage 1",
        )
        return self

    @model_validator(mode="after")
    def _tensor_ranks_divide_the_model(self) -> Config:
        model, ranks = self.model, self.parallel.tensor_model_parallel_size
        shared = {
            "num_attention_heads": model.num_attention_heads,
            "num_query_groups": model.num_key_value_heads,
            "ffn_hidden_size": model.mlp_size,
        }
        if self.parallel.sequence_parallel:
            _require(
                ranks > 1,
                "sequence_parallel: splits the sequence over the tensor ranks, and tensor_model_parallel_size is 1; "
                "raise it, or leave sequence_parallel out",
            )
            shared["seq_length"] = model.seq_length
        for name, size in shared.items():
            _require(
                size % ranks == 0,
                f"{name}: {size} is not divisible by tensor_model_parallel_size: {size} = {size // ranks} x {ranks} + "
                f"{size % ranks}; each tensor rank takes an equal part",
            )
        return self

    @property
    def lr_decay_iters(self) -> int:
        return self.optimizer.lr_decay_iters or self.training.train_iters

    @property
    def lr_wsd_decay_iters(self) -> int:
        return self.optimizer.lr_wsd_decay_iters or max(1, self.lr_decay_iters // 10)

    def global_batch_size(self, data_parallel_size: int) -> int:
        """Samples in one optimizer step.

        Raises:
            ValueError: it is not a multiple of micro_batch_size x data-parallel ranks; the arithmetic is shown.
        """
        micro, size = self.training.micro_batch_size, self.training.global_batch_size
        per_pass = micro * data_parallel_size
        _require(
            size is None or size % per_pass == 0,
            f"global_batch_size: {size} is not a multiple of micro_batch_size ({micro}) x data-parallel ranks "
            f"({data_parallel_size}) = {per_pass}",
        )
        return size or per_pass

    def micro_batches_per_step(self, data_parallel_size: int) -> int:
        """Forward and backward passes of one rank in one optimizer step."""
        return self.global_batch_size(data_parallel_size) // (self.training.micro_batch_size * data_parallel_size)

    def to_flat(self) -> dict[str, Any]:
        """Flat mapping of plain values, as the YAML file holds it: every group but `adalrs` is merged into the top."""
        groups = self.model_dump(mode="json")
        adalrs = groups.pop("adalrs")
        flat = {name: value for group in groups.values() for name, value in group.items() if value is not None}
        for name in ("config", "local_rank"):
            flat.pop(name, None)
        return flat | {"adalrs": {name: value for name, value in adalrs.items() if value is not None}}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
