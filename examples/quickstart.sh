#!/usr/bin/env bash
# From a fresh machine to a trained model whose learning rate found itself. Needs Python 3.10+.
# Every step is skipped when its output is there and valid. Output goes to data/quickstart and runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/environment.sh
prepare_environment requirements.txt

data=data/quickstart
run=runs/quickstart
mkdir -p "$data"

# A corpus of real text that is already here: the sources of Python's standard library.
corpus="$data/stdlib.jsonl"
[ -s "$corpus" ] || python tools/collect_sources.py --output "$corpus"

model="$data/tokenizer.model"
[ -s "$model" ] || python tools/train_tokenizer.py --input "$corpus" --output "$model" --vocab-size 2048

if ! python tools/check_dataset.py "$data/stdlib" --tokenizer-type SentencePieceTokenizer --tokenizer-model "$model" 2>/dev/null; then
    python tools/preprocess_data.py --input "$corpus" --output-prefix "$data/stdlib" --overwrite --restart --workers 2 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$model"
fi

# A run that is complete is kept; one that was interrupted goes on; `rm -r runs/quickstart` starts anew.
if [ ! -e "$run/report.html" ]; then
    resume=()
    if compgen -G "$run/checkpoints/iter_*/manifest.json" >/dev/null; then
        resume=(--load "$run")
    elif [ -e "$run" ]; then
        rm -r "$run"
    fi
    deepspeed --num_accelerators 2 pretrain_gpt.py --config examples/quickstart.yaml --run-dir "$run" "${resume[@]}"
    python tools/report.py "$run"
else
    echo "$run is complete; remove it to train again"
fi
cat <<MESSAGE

report: $run/report.html
the same run at the fixed rate that it started from, and both in one report:
  source $VIRTUAL_ENV/bin/activate; export OMP_NUM_THREADS=1
  deepspeed --num_accelerators 2 pretrain_gpt.py --config examples/quickstart.yaml --adalrs.no-enabled --run-dir runs/quickstart-fixed
  python tools/report.py runs/quickstart-fixed runs/quickstart --output runs/comparison.html
MESSAGE
