#!/usr/bin/env bash
# shellcheck disable=SC1091,SC2329
# Runs on each worker of a TPU for tpu_run.sh, which copies it to the home directory as dlm_worker.sh.
#   install EXTRAS [URL COMMIT]   the code, from dlm_jax.tar.gz or a clone, and an environment for it
#   start ARGUMENT...             `dlm train ARGUMENT...`, detached: it outlives the ssh connection
#   status                        one line: dlm-worker SLICE/WORKER running, exited CODE, lost or none
#   log [BYTES]                   the log's size on a line, then the log from there, or its last 20 lines
#   stop SECONDS [CODE]           SIGTERM, on which the training saves; SIGKILL after SECONDS; CODE becomes its code
# One training per node: its process holds dlm_run/lock. Next to it are command, pid, group, log and exit.
set -euo pipefail
code=$HOME/dlm_jax environment=$HOME/dlm_env run=$HOME/dlm_run

metadata() {
    curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" || true
}

identity() {  # as JAX determines it
    local slice worker
    slice=$(metadata tpu-env | sed -n "s/^MEGASCALE_SLICE_ID: *'\([0-9]*\)'.*/\1/p")
    worker=$(metadata agent-worker-number)
    echo "${slice:-0}/${worker:-0}"
}

complain() { echo "worker $(identity): $*" >&2; }

alive() { ! flock --shared --nonblock "$run/lock" true; }

make_environment() {
    local python
    [ ! -x "$environment/bin/python" ] || return 0
    rm -rf "$environment"
    if python=$(find_python 2> /dev/null) && "$python" -m venv "$environment" > /dev/null 2>&1; then return; fi
    # The usual images of TPU VMs have Python 3.10 only; uv brings a newer one.
    rm -rf "$environment"
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 "$environment"
}

install() {
    if alive; then
        complain "a training runs; its code is not replaced"
        return
    fi
    rm -rf "$code"
    if [ $# -gt 1 ]; then
        git clone --quiet "$2" "$code"
        git -C "$code" checkout --quiet "$3"
    else
        mkdir "$code"
        tar -xzf dlm_jax.tar.gz -C "$code"
    fi
    cd "$code"
    source launch/setup_env.sh
    make_environment || { complain "could not make an environment with Python 3.11 or newer"; exit 1; }
    source "$environment/bin/activate"
    setup_env "$1" > "$run/install.log" 2>&1 || { complain "$(cat "$run/install.log")"; exit 1; }
}

start() {
    local command
    printf -v command '%q ' "$@"
    [ ! -e "$run/exit" ] || kill_rest
    exec 9> "$run/lock"
    if ! flock --timeout 1 9; then
        if [ "$(cat "$run/command")" = "$command" ]; then return; fi
        complain "another training runs here, $(cat "$run/command"): end it with --stop"
        exit 3
    fi
    rm -f "$run/exit" "$run/pid"
    printf %s "$command" > "$run/command"
    setsid bash "$0" supervise "$@" < /dev/null >> "$run/log" 2>&1 &  # descriptor 9 holds the lock while it lives
}

supervise() {
    local coordinator=(--coordinator=auto) status=0
    case " $* " in *" --coordinator"*) coordinator=() ;; esac
    echo $$ > "$run/group"
    cd "$code"
    source "$environment/bin/activate"
    if [ -e "$HOME/dlm_env_file" ]; then
        set -a
        source "$HOME/dlm_env_file"
        set +a
    fi
    python -m dlm_jax.cli.main train ${coordinator[@]+"${coordinator[@]}"} "$@" &
    echo $! > "$run/pid"
    wait $! 2> /dev/null || status=$?
    echo "$status" > "$run/exit.new"
    mv "$run/exit.new" "$run/exit"
}

status() {
    local state=none
    if alive && [ ! -e "$run/exit" ]; then state=running  # the code is written before the lock is free
    elif [ -e "$run/exit" ]; then state="exited $(cat "$run/exit")"
    elif [ -e "$run/command" ]; then state=lost  # the machine was restarted, or the supervisor killed
    fi
    echo "dlm-worker $(identity) $state"
}

log() {
    local size
    touch "$run/log"
    size=$(stat --format=%s "$run/log")
    echo "$size"
    if [ -n "${1:-}" ]; then tail --bytes=+$(($1 + 1)) "$run/log" | head --bytes=$((size > $1 ? size - $1 : 0))
    else tail --lines=20 "$run/log"
    fi
}

stop() {
    local since=$SECONDS
    alive || return 0
    if [ -e "$run/pid" ]; then kill -TERM "$(cat "$run/pid")" 2> /dev/null || true; fi
    while alive && [ ! -e "$run/exit" ] && [ $((SECONDS - since)) -lt "$1" ]; do sleep 0.2; done
    kill_rest
    if [ ! -e "$run/exit" ] || [ -n "${2:-}" ]; then echo "${2:-137}" > "$run/exit"; fi
}

kill_rest() { if alive; then kill -KILL -- "-$(cat "$run/group")" 2> /dev/null || true; fi; }

mkdir -p "$run"
"$@"; exit  # on one line: this file may be replaced while it runs
