#!/usr/bin/env bash
# Set up what is missing and run the test suite: ./tests/run.sh [--system] [pytest arguments]
#   --system   also install the Debian packages that some tests need, and run those tests
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/environment.sh
prepare_environment requirements-test.txt

install_missing() { # PROGRAM:PACKAGE ...
    local pair sudo missing=()
    for pair in "$@"; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    if [ "${#missing[@]}" = 0 ]; then
        return
    fi
    echo "== installing ${missing[*]}"
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

for argument in "$@"; do
    if [ "$argument" = --system ]; then
        # A browser for the report, and tools that simulate two nodes on one machine.
        install_missing chromium:chromium ip:iproute2 sshd:openssh-server ssh:openssh-client pdsh:pdsh
    fi
done

ruff check .
ruff format --check .
codespell
mypy
# Two processes: many tests wait for ranks, and each file's tests stay together, since they share them.
exec python -m pytest -n 2 --dist loadfile "$@"
