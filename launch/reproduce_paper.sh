#!/usr/bin/env bash
# Measures the published checkpoints of DiffuGPT and DiffuLLaMA (arXiv 2410.17891) and their parents: the paper's table,
# by the tasks of the DiffuLLaMA reference implementation and by lm-eval's, with standard errors; the likelihood of a
# text; and, given the reference implementation, the difference of the logits of both codes.
#   bash launch/reproduce_paper.sh [FLAG...]
# It needs a network, or copies under --checkpoints and --data_dir; Llama 2 needs a hub account that may read it. GSM8K
# is not among the tasks: the paper's models are fine-tuned for it. The same command resumes. It sets its environment
# up, unless the variable PYTHON names an interpreter. Flags:
#   --tasks=NAME,...         default hellaswag,winogrande,social_iqa,piqa,lambada_openai,triviaqa, which the hub has;
#                            rocstories needs --data_dir, humaneval_fim_single_line bubblewrap
#   --data_dir=DIR           the tasks' files, instead of the hub
#   --limit=N                items per task (default all)
#   --allow_code_execution   for humaneval_fim_single_line
#   --data=FILE              a text to measure the likelihood of: a file, a glob, a directory made by `dlm prepare`,
#                            tfds:NAME or hf:NAME (default none)
#   --models=NAME,...        among diffugpt-s, diffugpt-m, diffullama (default all three)
#   --checkpoints=DIR        DIR/diffugpt-s, DIR/gpt2, ... instead of the hub
#   --reference=DIR          a checkout of github.com/HKUNLP/DiffuLLaMA
#   --reference_python=PYTHON  an interpreter with its requirements (default python3)
#   --output=DIR             results, and the table in table.md (default reproduction)
#   --batch_size=N, --dtype=, --mesh=, and for --data --num_rows=N, --num_masks=N, --length=N: as in `dlm evaluate`
#   --dry-run                print the commands, one per line, and run none
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

# shellcheck disable=SC2034
data='' models=diffugpt-s,diffugpt-m,diffullama checkpoints='' reference='' reference_python=python3 \
    output=reproduction tasks=hellaswag,winogrande,social_iqa,piqa,lambada_openai,triviaqa data_dir='' \
    limit='' allow_code_execution='' batch_size='' num_rows='' num_masks='' length='' dtype='' mesh='' dry_run=''
parse_flags "data models checkpoints reference reference_python output tasks data_dir limit batch_size num_rows \
    num_masks length dtype mesh" "dry_run allow_code_execution" "" "$@"
[ ${#train[@]} = 0 ] || misuse "there are no arguments after --"
for flag in num_rows num_masks length; do
    [ -z "${!flag}" ] || [ -n "$data" ] || misuse "--$flag is for the text of --data, which is not given"
done
[ -z "$reference" ] || [ -e "$reference/model.py" ] ||
    misuse "--reference=$reference has no model.py; it is not the reference implementation"

# The parent of a published checkpoint, and where to find either.
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

likelihood() {  # MODEL OBJECTIVE RESULT FLAG...
    note "$1, $2, the text"
    run "${PYTHON:-python}" -m dlm_jax.cli.main evaluate --model="$1" --objective="$2" --data "$data" --json="$3" \
        "${shared[@]}" "${of_text[@]}" "${@:4}" > /dev/null
}
scores() {  # MODEL PARENT TASKS RESULT
    [ -n "$dry_run" ] || [ ! -e "$4" ] || return 0
    note "$1, $3"
    run "${PYTHON:-python}" -m dlm_jax.cli.main evaluate --model="$1" --parent="$2" --tasks="$3" --out="$4" \
        "${shared[@]}" "${of_tasks[@]}" > /dev/null
}
of_paper() {  # the names of the same tasks as the paper's scripts ask them
    sed -e 's/lambada_openai/lambada/g' -e 's/[^,]*/diffullama_&/g' <<< "$tasks"
}

IFS=, read -ra names <<< "$models"
for name in "${names[@]}"; do parent_of "$name" > /dev/null; done
shared=() of_text=() of_tasks=()
for flag in batch_size dtype mesh; do [ -z "${!flag}" ] || shared+=("--$flag=${!flag}"); done
for flag in num_rows length; do [ -z "${!flag}" ] || of_text+=("--$flag=${!flag}"); done
for flag in data_dir limit; do [ -z "${!flag}" ] || of_tasks+=("--$flag=${!flag}"); done
[ -z "$allow_code_execution" ] || of_tasks+=(--allow_code_execution)
if [ -z "$dry_run${PYTHON:-}" ]; then
    here=$PWD
    cd "$root"
    source launch/setup_env.sh
    setup_env evaluation >&2
    cd "$here"
fi
run mkdir -p "$output"
for name in "${names[@]}"; do
    parent=$(parent_of "$name")
    model=$(locate "$name")
    base=$(locate "$parent")
    run rm -f "$output/$name.parity.json"
    if [ -n "$reference" ]; then
        note "$model, logits of both codes"
        run "$reference_python" "$root/launch/reference_parity.py" reference "$reference" "$model" "$base" \
            "$output/$name.npz"
        run "${PYTHON:-python}" "$root/launch/reference_parity.py" compare "$model" "$output/$name.npz" \
            "$output/$name.parity.json"
    fi
    if [ -n "$data" ]; then
        likelihood "$base" autoregressive "$output/$name.text.parent.json"
        likelihood "$model" diffusion "$output/$name.text.json" ${num_masks:+--num_masks="$num_masks"}
    fi
    scores "$model" "$base" "$(of_paper)" "$output/$name.reference.json"
    scores "$model" "$base" "$tasks" "$output/$name.default.json"
done
run "${PYTHON:-python}" "$root/launch/paper_table.py" "$output" "${names[@]}"
