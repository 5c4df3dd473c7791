#!/usr/bin/env bash
# Set up what is missing and run the test suite: ./tests/run.sh [--system] [pytest arguments]
#   --system   also install the Debian packages that some tests need, and run those tests
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/environment.sh
prepare_environment requirements-test.txt

for argument in "$@"; do
    if [ "$argument" = --system ] && ! command -v chromium >/dev/null; then
        echo "== installing chromium"
        sudo=$([ "$(id -u)" = 0 ] || echo sudo)
        $sudo apt-get update -qq
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
    fi
done

ruff check .
ruff format --check .
exec python -m pytest "$@"
