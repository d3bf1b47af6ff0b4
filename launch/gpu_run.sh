#!/usr/bin/env bash
# Trains on the GPUs of this machine: sets the environment up, checks that JAX sees every GPU, trains on all of them,
# and restarts a training that died from its last checkpoint. See docs/guides/launch.md.
#   bash launch/gpu_run.sh [FLAG...] -- --config=diffugpt_s --workdir=runs/gpt2 --config.data.train=fineweb-rows
# Arguments after -- go to `dlm train` unchanged; CUDA_VISIBLE_DEVICES chooses among the GPUs. Flags:
#   --extras=EXTRAS       what is installed with the code (default cuda)
#   --max_restarts=N      restarts of a training that died (default 10)
#   --deterministic       runs and resumed runs equal bit for bit, at some cost in speed
#   --dry-run             print the commands, one per line, and run none
set -euo pipefail
here=$PWD
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

extras=cuda max_restarts=10 deterministic='' dry_run=''
parse_flags "extras max_restarts" "deterministic dry_run" "" "$@"
check_number max_restarts "$max_restarts" 0
check_train_arguments "${train[@]}"

run nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader ||
    fail "nvidia-smi does not work, so there is no NVIDIA GPU or no driver here; on a CPU run \`dlm train\` itself"

# XLA lets the last of a flag win, so the user's come last.
flags=--xla_gpu_enable_latency_hiding_scheduler=true  # communication overlaps computation
[ -z "$deterministic" ] || flags+=" --xla_gpu_deterministic_ops=true"
export XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}"
export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.92}  # JAX's default is 0.75
if [ -n "$dry_run" ]; then
    run bash -c "cd $(quoted "$root") && source launch/setup_env.sh && setup_env $(quoted "$extras")"
    run export "XLA_FLAGS=$XLA_FLAGS" "XLA_CLIENT_MEM_FRACTION=$XLA_CLIENT_MEM_FRACTION"
    run dlm train "${train[@]}"
    exit
fi
cd "$root"
source launch/setup_env.sh
setup_env "$extras"
cd "$here"

if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then expected=$(tr , '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)
else expected=$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)
fi
count='import jax; print(sum(device.platform == "gpu" for device in jax.devices()))'
seen=$("$PYTHON" -c "$count" 2> /dev/null | tail -n 1) || true
[ "${seen:-0}" = "$expected" ] || fail "JAX sees ${seen:-0} of $expected GPUs: install it for CUDA (--extras=cuda)" \
    "and check that the driver is recent enough; \`python -c 'import jax; jax.devices()'\` shows details"

train_with_restarts "$max_restarts" "$PYTHON" -m dlm_jax.cli.main train "${train[@]}"
