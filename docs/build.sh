#!/usr/bin/env bash
# Build the documentation: docs/build.sh [OUTPUT FOLDER]. Needs no network; warnings are errors.
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-docs/_build/html}
export PYTHONPATH="$PWD:$PWD/docs${PYTHONPATH:+:$PYTHONPATH}" # the package, and the Sphinx extension in docs/
DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} python -m sphinx --fail-on-warning --keep-going --quiet \
    -d "$output.doctrees" -b html docs "$output"
echo "documentation: $output/index.html"
