#!/usr/bin/env bash
# The main job, on a new machine: sets itself up, adapts a base model to diffusion, samples it and exports it.
#   bash launch/quickstart.sh                                         the small base under assets/, offline
#   bash launch/quickstart.sh --base gpt2 --data 'text/*.txt'         any hub id, directory or GGUF file, any text
# It first times a few steps on this machine and says how long it will take; a large base gets what fits into minutes.
# Everything goes to ./quickstart (or --workdir DIR). Running it again resumes, or shows the results again.
# `bash launch/quickstart.sh --help` lists all arguments.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
root=$PWD
source launch/setup_env.sh
setup_env ""
cd "$here"
case " $* " in
    *" --base"*) ;;
    *) set -- --base "$root/assets/stories-gpt2" "$@" ;;
esac
case " $* " in
    *" --data"*) ;;
    *) set -- --data "$root/assets/stories-text/train.jsonl" --validation "$root/assets/stories-text/heldout.jsonl" "$@" ;;
esac
exec "$PYTHON" -m dlm_jax.cli.main quickstart "$@"
