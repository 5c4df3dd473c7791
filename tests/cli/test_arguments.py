"""Defaults, preset, YAML and flags, in that order; every mistake is one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_adalrs.adalrs.settings import AdaLRSSettings, Mode
from megatron_adalrs.cli.arguments import config_from_values, load_yaml, parse_arguments
from megatron_adalrs.config import Config
from megatron_adalrs.config.run import RUN_CONFIG

REQUIRED = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --train-iters 100 --lr "
    "1e-3 --data-path d"
)
VALUES = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "train_iters": 100,
    "lr": 1e-3,
    "data_path": "d",
}


def parse(line: str) -> Config:
    return parse_arguments(line.split())


def write(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_flags_a_megatron_user_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("l/iter_0000010").mkdir(parents=True)
    config = parse(
        REQUIRED
        + " --micro-batch-size 2 --global-batch-size 8 --min-lr 1e-5 --lr-decay-style WSD --lr-warmup-iters 5"
        " --weight-decay 0.01 --clip-grad 0.5 --split 9,1,0 --tokenizer-type ByteTokenizer --save s --load l"
        " --save-interval 10 --eval-interval 20 --eval-iters 3 --log-interval 4 --tensorboard-dir t "
        "--zero-stage 2"
        " --bf16 --seed 7 --adalrs.mode paper --adalrs.alpha 2.5 --adalrs.window 5 --adalrs.search-start 0.2"
    )
    assert config.model.num_layers == 2
    assert (config.training.zero_stage, config.training.bf16, config.training.seed) == (2, True, 7)
    assert (config.optimizer.lr_decay_style, config.optimizer.clip_grad) == ("WSD", 0.5)
    assert (config.adalrs.mode, config.adalrs.alpha) == ("paper", 2.5)
    assert config.run.save == Path("s")


def test_underscores_and_local_rank_are_accepted() -> None:
    assert parse(REQUIRED + " --local_rank=1 --zero_stage 1").training.zero_stage == 1


def test_flags_override_the_file_and_file_the_preset(tmp_path: Path) -> None:
    content = {
        "preset": "llama-tiny",
        "hidden-size": 96,
        "num_layers": 3,
        "seq_length": 16,
        "train_iters": 400,
        "lr": "1e-4",
        "data_path": "x",
        "adalrs": {"mode": "paper", "beta": 1.5},
    }
    file = write(tmp_path / "c.yaml", content)
    config = parse(f"--config {file} --num-layers 5 --adalrs.alpha 2")
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (5, 96, 4)
    assert config.model.normalization == "RMSNorm"
    assert (config.optimizer.lr, config.adalrs.alpha, config.adalrs.beta) == (1e-4, 2.0, 1.5)


def test_checks_between_fields_wait_for_the_flags(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", VALUES | {"hidden_size": 65})
    assert parse(f"--config {file} --hidden-size 64").model.hidden_size == 64


def test_the_effective_configuration_can_be_read_back(tmp_path: Path) -> None:
    config = parse(
        REQUIRED + " --preset qwen2-tiny --bf16 --adalrs.mode paper --adalrs.window 5 --adalrs.max-scale 50"
    )
    file = write(tmp_path / "config.yaml", config.to_flat())
    assert parse(f"--config {file}").to_flat() == config.to_flat()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_layer": 3}, "num_layer: no such field; did you mean num_layers?"),
        ({"adalrs": {"alfa": 3}}, "adalrs.alfa: no such field; did you mean alpha?"),
        ({"adalrs": 3}, "adalrs: 3: must be a mapping"),
        ({"loss_guard": {"sigmma": 3}}, "loss_guard.sigmma: no such field; did you mean sigma?"),
        ({"num_layers": "many"}, "num_layers: 'many': input should be a valid integer"),
        ({"lr_decay_style": "step"}, "lr_decay_style: 'step': input should be 'constant', 'linear'"),
        ([1, 2], "must hold a mapping of fields, not a list"),
    ],
)
def test_mistakes_in_a_file_name_the_file_and_the_key(tmp_path: Path, content: object, message: str) -> None:
    file = write(tmp_path / "c.yaml", content)
    with pytest.raises(ValueError) as error:
        parse(f"--config {file}")
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_of_a_tokenizer_need_its_kind() -> None:
    for name in ("vocab", "merge"):
        with pytest.raises(ValueError, match=f"{name}_file: x: give --tokenizer-type GPT2BPETokenizer too"):
            parse(f"{REQUIRED} --{name}-file x")
    config = parse(f"{REQUIRED} --tokenizer-type GPT2BPETokenizer --vocab-file v --merge-file m")
    assert (config.data.vocab_file, config.data.merge_file) == (Path("v"), Path("m"))


def test_a_missing_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config: cannot read .*nope.yaml"):
        parse(f"--config {tmp_path}/nope.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"--config: cannot read .*broken.yaml"):
        parse(f"--config {tmp_path}/broken.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-layers -1", "num_layers: -1: input should be greater than 0"),
        ("--lr 0", "lr: 0.0: input should be greater than 0"),
        ("--lr nan", "lr: nan: input should be greater than 0"),
        ("--lr inf", "lr: inf: input should be a finite number"),
        ("--hidden-size 65", "hidden_size: 65 is not divisible by num_attention_heads: 65 = 16 x 4 + 1"),
        ("--num-query-groups 3", "num_query_groups: 3 does not divide num_attention_heads: 4 = 1 x 3 + 1"),
        ("--position-embedding-type rope --kv-channels 15", "the head size must be even, not 15"),
        (
            "--use-rope-scaling",
            "use_rope_scaling: True: only rotary positions are scaled, required position_embedding_",
        ),
        ("--rope-scaling-factor 0.5", "rope_scaling_factor: 0.5: input should be greater than or equal to 1"),
        (
            "--position-embedding-type rope --use-rope-scaling --rope-scaling-low-freq-factor 4",
            "rope_scaling_low_freq_factor: 4.0: required below rope_scaling_high_freq_factor, 4.0",
        ),
        (
            "--rope-scaling-low-freq-factor 0",
            "rope_scaling_low_freq_factor: 0.0: input should be greater than 0",
        ),
        (
            "--rope-scaling-high-freq-factor -1",
            "rope_scaling_high_freq_factor: -1.0: input should be greater than 0",
        ),
        (
            "--rope-scaling-original-max-position-embeddings 0",
            "rope_scaling_original_max_position_embeddings: 0: input should be greater than 0",
        ),
        ("--max-position-embeddings 16", "max_position_embeddings: 16 is below seq_length 32"),
        ("--min-lr 1", "min_lr: 1 is above lr 0.001"),
        ("--lr-warmup-iters 100", "lr_warmup_iters: 100 leaves nothing of lr_decay_iters (100)"),
        (
            "--lr-decay-style WSD --lr-warmup-iters 50 --lr-wsd-decay-iters 60",
            "lr_wsd_decay_iters: warm-up 50 + decay 60 exceed lr_decay_iters 100",
        ),
        ("--adalrs.mode paper --adalrs.window 40", "adalrs.search_start"),
        ("--adalrs.mode paper --adalrs.alpha 0.5", "adalrs.alpha"),
        ("--loss-guard.sigma -1", "loss_guard.sigma: -1.0: input should be greater than 0"),
        ("--loss-guard.sigma inf", "loss_guard.sigma: inf: input should be a finite number"),
        (
            "--loss-guard.policy rewind --loss-guard.rewind-interval 18 --loss-guard.extra-skipped-batches 3",
            "loss_guard.max_skipped: 0.2 of train_iters 100 are 20 batches, and one event may skip "
            "rewind_interval 18 + extra_skipped_batches 3 = 21",
        ),
        (
            "--loss-guard.policy skip --loss-guard.max-skipped 0.01 --loss-guard.extra-skipped-batches 1",
            "0.01 of train_iters 100 are 1 batches, and one event may skip 1 + extra_skipped_batches 1 = 2",
        ),
        ("--hidden-dropout 1.5", "hidden_dropout: 1.5: input should be less than 1"),
    ],
)
def test_values_that_cannot_be(flags: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(f"{REQUIRED} {flags}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_required_fields_are_named() -> None:
    with pytest.raises(ValueError, match="data_path: is required"):
        config_from_values({name: value for name, value in VALUES.items() if name != "data_path"})


def test_unknown_flags_exit_with_2_on_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    for print_errors in (True, False):
        with pytest.raises(SystemExit) as end:
            parse_arguments([*REQUIRED.split(), "--num-layrs", "3"], print_errors)
        assert end.value.code == 2
        assert ("--num-layrs" in "".join(capsys.readouterr())) == print_errors


def test_batch_arithmetic() -> None:
    config = config_from_values(VALUES | {"micro_batch_size": 2, "global_batch_size": 12})
    assert config.micro_batches_per_step(3) == 2
    with pytest.raises(ValueError, match=r"global_batch_size: 12 .* micro_batch_size \(2\) x .* \(4\) = 8"):
        config.global_batch_size(4)
    assert config_from_values(VALUES | {"micro_batch_size": 2}).global_batch_size(4) == 8


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['pretrain_gpt.py', '--help']; import pretrain_gpt\n"
        "try: pretrain_gpt.main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('torch' in sys.modules, 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--adalrs.window" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "False False"


def test_the_shape_of_the_run_that_a_run_begins_with(tmp_path: Path) -> None:
    needed = ["--seq-length", "64", "--train-iters", "1", "--lr", "1", "--data-path", "d"]
    own = ["--preset", "gpt2-tiny", "--num-layers", "3", "--hidden-dropout", "0.3"]
    first = parse_arguments([*own, *needed])
    (tmp_path / RUN_CONFIG).write_text(yaml.safe_dump(first.to_flat()))
    begun = parse_arguments(["--finetune-from", str(tmp_path), *needed, "--seq-length", "32"]).model
    assert (begun.num_layers, begun.hidden_size, begun.seq_length) == (3, first.model.hidden_size, 32)
    assert (begun.max_positions, begun.hidden_dropout) == (64, 0.0), (
        "as many learned positions; dropout is its own"
    )
    assert (
        parse_arguments(["--finetune-from", str(tmp_path), "--preset", "gpt2", *needed]).model.hidden_size
        == 768
    )
    with pytest.raises(ValueError, match=r"--finetune-from: .*nothing is not a folder: required"):
        parse_arguments(["--finetune-from", str(tmp_path / "nothing"), *needed])


SEARCH = REQUIRED + " --preset gpt2-tiny"


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        (" --adalrs.window 20", "", r"adalrs\.window: .*--adalrs\.mode paper"),
        (" --adalrs.alpha 3.0", "", r"adalrs\.alpha: .*--adalrs\.mode robust"),
        (" --adalrs.no-climb", "", r"adalrs\.climb: .*--adalrs\.mode robust"),
        ("", "adalrs: {climb: true}", r"adalrs\.climb: .*--adalrs\.mode robust"),
        ("", "adalrs: {mode: off, alpha: 3.0}", r"adalrs\.alpha: .*--adalrs\.mode"),
        ("", "adalrs: {mode: true}", r"mode: True: input should be 'off', 'paper' or 'robust'"),
        ("", "adalrs: {enabled: true}", r"enabled: no such field.*mode"),
        (" --adalrs.enabled", "", r"--adalrs\.enabled: no such flag; use --adalrs\.mode"),
        (" --adalrs.mode robust --adalrs.beta 2.0", "", r"adalrs\.beta: belongs to adalrs\.mode=paper"),
    ],
)
def test_search_settings_without_effect_are_refused(
    tmp_path: Path, flags: str, content: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_arguments((SEARCH + flags + f" --config {path}").split())


@pytest.mark.parametrize("mode", ["off", "paper", "robust"])
def test_written_search_settings_are_read_back(tmp_path: Path, mode: Mode) -> None:
    config = parse_arguments((SEARCH + f" --train-iters 2000 --adalrs.mode {mode}").split())
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_flat()))
    modes: tuple[Mode, ...] = ("off", "paper", "robust")
    for other in modes:
        changed = parse_arguments(["--config", str(path), "--adalrs.mode", other])
        assert changed.adalrs == AdaLRSSettings(mode=other)
    assert parse_arguments(["--config", str(path)]).adalrs == config.adalrs


def test_unquoted_off_in_yaml_is_no_search(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("adalrs: {mode: off}")
    assert not parse_arguments((SEARCH + f" --config {path}").split()).adalrs.is_on


def test_file_cannot_name_another_file(tmp_path: Path) -> None:
    file = write(tmp_path / "config.yaml", {"config": "other.yaml"})
    with pytest.raises(ValueError, match=r"config\.yaml: config: other\.yaml: has no effect in a file"):
        load_yaml(file)
