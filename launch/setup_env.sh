# Sourced by the scripts in this folder, from the project's root.
#   setup_env EXTRAS   uses the active environment or makes .venv, installs -e .[EXTRAS] if the requirements have
#                      changed since the last time, and sets $PYTHON to the interpreter. EXTRAS may be empty.

# Large arrays on huge pages make a training step on a CPU a fifth faster. C libraries other than glibc ignore it.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "dlm_jax needs Python 3.11, 3.12 or 3.13, and none is on the PATH; install one and run this again." >&2
    return 1
}

setup_env() {
    local extras=$1 python target=".${1:+[$1]}" home stamp required
    if [ -n "${VIRTUAL_ENV:-}" ] || [ -n "${CONDA_PREFIX:-}" ]; then
        PYTHON=$(command -v python)
    else
        if [ ! -x .venv/bin/python ]; then
            python=$(find_python) || return 1
            "$python" -m venv .venv || return 1
        fi
        PYTHON=$PWD/.venv/bin/python
    fi
    home=$("$PYTHON" -c 'import sys; print(sys.prefix)') || return 1
    stamp=$home/.dlm_jax-${extras:-base}
    required=$(cat requirements.txt setup.py pyproject.toml <(pwd) | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$required" ]; then
        echo "installing into $home (once, about two minutes)"
        "$PYTHON" -m pip --version > /dev/null 2>&1 || "$PYTHON" -m ensurepip > "$stamp.log" 2>&1 || true
        if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$target" > "$stamp.log" 2>&1; then
            tail -n 20 "$stamp.log" >&2
            echo "the installation failed; the full log is $stamp.log" >&2
            return 1
        fi
        echo "$required" > "$stamp"
    fi
    echo "environment $home"
}
