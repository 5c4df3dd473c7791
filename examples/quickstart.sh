#!/usr/bin/env bash
# Prepare a corpus, train a small model with the learning-rate search, and write a report. Needs Python 3.10 or newer.
# A step is skipped if its output exists and is valid. Output goes to data/quickstart and runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/environment.sh
prepare_environment requirements.txt

data=data/quickstart
run=runs/quickstart
mkdir -p "$data"

# The corpus: the source code of Python's standard library.
corpus="$data/stdlib.jsonl"
[ -s "$corpus" ] || megatron-adalrs collect-sources --output "$corpus"

model="$data/tokenizer.model"
[ -s "$model" ] || megatron-adalrs train-tokenizer --input "$corpus" --output "$model" --vocab-size 2048

if ! megatron-adalrs check-data "$data/stdlib" --tokenizer-type SentencePieceTokenizer --tokenizer-model "$model" 2>/dev/null; then
    megatron-adalrs preprocess --input "$corpus" --output-prefix "$data/stdlib" --overwrite --restart --workers 2 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$model"
fi

# Keep a complete run, and resume an interrupted one. `rm -r runs/quickstart` starts from the beginning.
if [ ! -e "$run/report.html" ]; then
    resume=()
    if compgen -G "$run/checkpoints/iter_*/manifest.json" >/dev/null; then
        resume=(--load "$run")
    elif [ -e "$run" ]; then
        rm -r "$run"
    fi
    deepspeed --num_accelerators 2 pretrain_gpt.py --config examples/quickstart.yaml --run-dir "$run" "${resume[@]}"
    megatron-adalrs report "$run"
else
    echo "$run is complete; remove it to train again"
fi
cat <<MESSAGE

report: $run/report.html
To compare with a run at the initial learning rate, without the search:
  source $VIRTUAL_ENV/bin/activate; export OMP_NUM_THREADS=1
  deepspeed --num_accelerators 2 pretrain_gpt.py --config examples/quickstart.yaml --adalrs.mode off --run-dir runs/quickstart-fixed
  megatron-adalrs report runs/quickstart-fixed runs/quickstart --output runs/comparison.html
MESSAGE
