# Source this file in the repository's root: it defines a function that prepares a Python environment with the pinned
# requirements and this package, in the active virtual environment or in .venv.
#   prepare_environment REQUIREMENTS_FILE

prepare_environment() {
    local requirements="$1" python="${PYTHON:-python3}" venv stamp
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: Python 3.10 or newer is required, $("$python" --version 2>&1) found; set PYTHON to a newer one" >&2
        exit 2
    }
    venv="${VIRTUAL_ENV:-$PWD/.venv}"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    stamp="$venv/.megatron_adalrs-$(cat requirements*.txt pyproject.toml | sha256sum | cut -c1-16)-$(basename "$requirements" .txt)"
    if [ ! -e "$stamp" ]; then
        echo "== installing $requirements into $venv"
        python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
        touch "$stamp"
    fi
    # DeepSpeed compiles extensions for one environment; environments that share a cache rebuild each other's.
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}"
    # One thread per rank, because the ranks share the cores.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    # Without this, DeepSpeed probes for an accelerator and warns if there is none.
    command -v nvidia-smi >/dev/null || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
}
