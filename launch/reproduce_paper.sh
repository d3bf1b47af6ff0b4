#!/usr/bin/env bash
# Measures the released checkpoints of DiffuGPT and DiffuLLaMA (arXiv 2410.17891) beside their parents: how probable
# they find a text, with standard errors; and, given the release's own code, whether both compute the same logits.
#   bash launch/reproduce_paper.sh --data=held_out.txt [FLAG...]
# The scores of the paper's table (LAMBADA, HellaSwag, ...) are not among it: `dlm evaluate` has no such tasks yet.
# It needs a network, or copies under --checkpoints; Llama 2 needs an account of the hub that may read it.
# It sets its environment up, unless the variable PYTHON names an interpreter. Flags:
#   --data=FILE              the text: a file, a glob, a directory made by `dlm prepare`, tfds:NAME or hf:NAME
#   --models=NAME,...        among diffugpt-s, diffugpt-m, diffullama (default all three)
#   --checkpoints=DIR        DIR/diffugpt-s, DIR/gpt2, ... instead of the hub
#   --release=DIR            a checkout of github.com/HKUNLP/DiffuLLaMA
#   --release_python=PYTHON  one with the release's requirements (default python3)
#   --output=DIR             results, and the table in table.md (default reproduction)
#   --num_rows=N, --num_samples=N, --length=N, --dtype=, --mesh=   as of `dlm evaluate`
#   --dry-run                print the commands, one a line, and run none
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

# shellcheck disable=SC2034
data='' models=diffugpt-s,diffugpt-m,diffullama checkpoints='' release='' release_python=python3 output=reproduction \
    num_rows='' num_samples='' length='' dtype='' mesh='' dry_run=''
parse_flags "data models checkpoints release release_python output num_rows num_samples length dtype mesh" \
    "dry_run" "" "$@"
[ ${#train[@]} = 0 ] || misuse "nothing stands after -- here"
[ -n "$data" ] || misuse "--data=FILE is missing: the text to measure on, such as LAMBADA's or WikiText's"
[ -z "$release" ] || [ -e "$release/model.py" ] || misuse "--release=$release has no model.py; it is not the release"

# The parent of a released checkpoint, and where either lies.
parent_of() {
    case $1 in
        diffugpt-s) echo gpt2 ;;
        diffugpt-m) echo gpt2-medium ;;
        diffullama) echo meta-llama/Llama-2-7b-hf ;;
        *) misuse "--models=$models: '$1' is none of diffugpt-s, diffugpt-m, diffullama" ;;
    esac
}
locate() {
    if [ -z "$checkpoints" ]; then
        case $1 in diffu*) echo "diffusionfamily/$1" ;; *) echo "$1" ;; esac
        return
    fi
    [ -d "$checkpoints/${1##*/}" ] || fail "--checkpoints=$checkpoints has no directory ${1##*/}"
    echo "$checkpoints/${1##*/}"
}

evaluate() {  # MODEL OBJECTIVE RESULT FLAG...
    note "$1, $2"
    run "${PYTHON:-python}" -m dlm_jax.cli.main evaluate --model="$1" --objective="$2" --data "$data" --json="$3" \
        "${shared[@]}" "${@:4}" > /dev/null
}

IFS=, read -ra names <<< "$models"
for name in "${names[@]}"; do parent_of "$name" > /dev/null; done
shared=()
for flag in num_rows length dtype mesh; do [ -z "${!flag}" ] || shared+=("--$flag=${!flag}"); done
if [ -z "$dry_run${PYTHON:-}" ]; then
    here=$PWD
    cd "$root"
    source launch/setup_env.sh
    setup_env "" >&2
    cd "$here"
fi
run mkdir -p "$output"
for name in "${names[@]}"; do
    parent=$(parent_of "$name")
    model=$(locate "$name")
    base=$(locate "$parent")
    run rm -f "$output/$name.parity.json"
    if [ -n "$release" ]; then
        note "$model, logits of both codes"
        run "$release_python" "$root/launch/release_parity.py" reference "$release" "$model" "$base" "$output/$name.npz"
        run "${PYTHON:-python}" "$root/launch/release_parity.py" compare "$model" "$output/$name.npz" \
            "$output/$name.parity.json"
    fi
    evaluate "$base" autoregressive "$output/$name.parent.json"
    evaluate "$model" diffusion "$output/$name.json" ${num_samples:+--num_samples="$num_samples"}
done
run "${PYTHON:-python}" "$root/launch/release_parity.py" table "$output" "${names[@]}"
