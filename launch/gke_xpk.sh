#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster through xpk (pip install xpk), with this checkout's HEAD. See docs/guides/launch.md.
#   bash launch/gke_xpk.sh --cluster=CLUSTER --name=NAME --type=v6e-256 [FLAG...] -- --config=NAME --workdir=gs://...
#   bash launch/gke_xpk.sh --cluster=CLUSTER --name=NAME [FLAG...] --status | --follow | --delete
# Arguments after -- go to `dlm train` unchanged. Flags:
#   --type=TYPE           type of one slice: v5litepod-256, v5p-128, v6e-256, ...
#   --slices=N            N slices train as one
#   --project=, --zone=   (default: gcloud's own)
#   --spot                request spot capacity where the cluster provisions nodes itself
#   --priority=PRIORITY   very-low, low, medium, high, very-high (default medium)
#   --image=IMAGE         a container image with this library installed; otherwise
#   --base_image=IMAGE    the image to copy the code into (default python:3.12), installed when a pod starts
#   --extras=EXTRAS       what is installed with it (default tpu,gcs)
#   --env_file=FILE       lines NAME=value for the training, such as HF_TOKEN
#   --max_restarts=N      restarts of a training that died (default 10)
#   --dry-run             print the commands, one per line, and run none
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

cluster='' name='' type='' slices=1 project='' zone='' spot='' priority=medium image='' base_image=python:3.12
extras=tpu,gcs env_file='' max_restarts=10 dry_run='' action=train
parse_flags "cluster name type slices project zone priority image base_image extras env_file max_restarts" \
    "spot dry_run" "status follow delete" "$@"
[ -n "$cluster" ] || misuse "--cluster=CLUSTER is missing: the GKE cluster, as in \`xpk cluster list\`"
[ -n "$name" ] || misuse "--name=NAME is missing: the name of the workload"

xpk_workload() {
    run xpk workload "$@" --cluster="$cluster" ${project:+--project="$project"} ${zone:+--zone="$zone"}
}

case $action in
    status) xpk_workload list --filter-by-job="$name"; exit ;;
    follow) xpk_workload list --wait-for-job-completion="$name"; exit ;;
    delete) xpk_workload delete --workload="$name" --force; exit ;;
esac

[ -n "$type" ] || misuse "--type=TYPE is missing, such as --type=v6e-256"
check_number slices "$slices" 1
check_number max_restarts "$max_restarts" 0
check_train_arguments "${train[@]}"
case $workdir in
    *://* | /*) ;;
    *) misuse "--workdir=$workdir is on the pod's own disk, which is deleted with the pod;" \
           "give gs://BUCKET/DIR or a mounted path" ;;
esac
[ -z "$env_file" ] || [ -r "$env_file" ] || misuse "--env_file=$env_file cannot be read"
if [ "$slices" -gt 1 ] && [ -z "$(argument_of config.mesh.dcn_data "${train[@]}")" ]; then
    train+=("--config.mesh.dcn_data=$slices")
fi

# One line, because xpk writes it into a YAML block. exec: a pod's SIGTERM reaches the training, which saves.
command="exec dlm train --coordinator=auto $(quoted "${train[@]}")"
if [ -n "$image" ]; then
    source=(--docker-image="$image")
else
    if [ -n "$dry_run" ]; then parcel=${TMPDIR:-/tmp}/dlm-$name
    else
        parcel=$(mktemp -d)
        trap 'rm -rf "$parcel"' EXIT
    fi
    run mkdir -p "$parcel/code"
    run git -C "$root" archive --output="$parcel/code.tar" HEAD || fail "there is no commit in $root to send"
    run tar -xf "$parcel/code.tar" -C "$parcel/code"
    source=(--base-docker-image="$base_image" --script-dir="$parcel/code")
    command="pip install --quiet --editable $(quoted ".[$extras]") && $command"
fi
# 75: saved after SIGTERM, 76: another process died. xpk itself restarts after 42 and 127 to 255.
xpk_workload create --workload="$name" --tpu-type="$type" --num-slices="$slices" --priority="$priority" \
    --max-restarts="$max_restarts" --restart-on-exit-codes=75,76 --termination-grace-period-seconds=300 \
    ${spot:+--spot} ${env_file:+--env-file="$env_file"} "${source[@]}" --command="$command"
note "--status shows it, --follow waits for its end, --delete ends it"
