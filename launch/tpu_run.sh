#!/usr/bin/env bash
# Trains on Cloud TPU VMs: creates or reuses a TPU, installs this code on all its workers, trains on all of them,
# follows the log, and after a preemption creates the TPU again and resumes from the last checkpoint.
# See docs/guides/launch.md.
#   bash launch/tpu_run.sh --name=NAME --zone=ZONE --type=v5litepod-16 [FLAG...] -- --config=NAME --workdir=gs://...
#   bash launch/tpu_run.sh --name=NAME --zone=ZONE [FLAG...] --status | --follow | --stop | --delete
# Arguments after -- go to `dlm train` unchanged. Flags:
#   --type=TYPE           type of one slice: v4-32, v5litepod-16, v5p-64, v6e-8, ...
#   --version=RUNTIME     the VM's software version (default: by the type)
#   --project=PROJECT     (default: gcloud's own)
#   --spot                cheaper, and may be preempted at any time
#   --queued              as a queued resource: waits in Google's queue until there is capacity
#   --slices=N            N slices train as one (as a queued resource)
#   --create_flags=FLAGS  more flags of `gcloud ... create`, separated by spaces, such as '--reserved --network=net'
#   --commit=COMMIT       a commit of this checkout, copied (default HEAD), or of --repo=URL, cloned on the workers
#   --extras=EXTRAS       what is installed with the code (default tpu,gcs)
#   --env_file=FILE       lines NAME=value for the training, such as HF_TOKEN; copied to the workers, never printed
#   --internal_ip         reach the workers by their internal addresses
#   --max_restarts=N      restarts of a training that died, not counting preemptions (default 10)
#   --delete_after        delete the TPU after the training
#   --poll=SECONDS        between two checks (default 20, or DLM_LAUNCH_POLL)
#   --dry-run             print the commands, one per line, and run none
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

name='' zone='' type='' version='' project='' spot='' queued='' slices=1 create_flags='' repo='' commit=''
extras=tpu,gcs env_file='' internal_ip='' max_restarts=10 delete_after='' poll=${DLM_LAUNCH_POLL:-20} dry_run=''
action=train
parse_flags "name zone type version project slices create_flags repo commit extras env_file max_restarts poll" \
    "spot queued internal_ip delete_after dry_run" "status follow stop delete" "$@"

check_arguments() {
    [ -n "$name" ] || misuse "--name=NAME is missing: the name of the TPU"
    [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || misuse "--name=$name: lowercase letters, digits and dashes only"
    [ -n "$zone" ] || misuse "--zone=ZONE is missing, such as --zone=us-west4-a"
    check_number slices "$slices" 1
    check_number max_restarts "$max_restarts" 0
    [[ $poll =~ ^[0-9]*\.?[0-9]+$ ]] || misuse "--poll must be a number of seconds, got '$poll'"
    [ "$slices" = 1 ] || queued=yes
    if [ "$action" != train ]; then
        [ ${#train[@]} = 0 ] || misuse "--$action takes no arguments of \`dlm train\`"
        return 0
    fi
    [[ $type =~ ^(v2|v3|v4|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]] ||
        misuse "--type='$type' is not an accelerator type such as v4-32, v5litepod-16, v5p-64, v6e-8"
    case $type in
        v5litepod-*) version=${version:-v2-alpha-tpuv5-lite} ;;
        v5p-*) version=${version:-v2-alpha-tpuv5} ;;
        v6e-*) version=${version:-v2-alpha-tpuv6e} ;;
        *) version=${version:-tpu-ubuntu2204-base} ;;
    esac
    check_train_arguments "${train[@]}"
    case $workdir in
        *://*) ;;
        /*) say "note: --workdir=$workdir must be on a disk that all workers mount: a VM's own is deleted with it" ;;
        *) if [ -n "$spot" ] || [ "$slices" -gt 1 ] || [ "${type##*-}" -gt 8 ]; then  # up to 8 is one worker
               misuse "--workdir=$workdir is on a VM's own disk, which a preemption deletes and workers do not share;" \
                   "give gs://BUCKET/DIR, or the absolute path of a disk that all workers mount"
           fi ;;
    esac
    [[ $repo != *://*@* ]] || misuse "--repo must not hold a user or a token: it is printed, and stored on the workers"
    [ -z "$repo" ] || [ -n "$commit" ] || misuse "--repo needs --commit=SHA"
    [ -z "$env_file" ] || [ -r "$env_file" ] || misuse "--env_file=$env_file cannot be read"
    if [ "$slices" -gt 1 ] && [ -z "$(argument_of config.mesh.dcn_data "${train[@]}")" ]; then
        train+=("--config.mesh.dcn_data=$slices")
    fi
}

tpu() { run gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"} --quiet; }

# The state of a TPU, or of its queued resource, in Google's words, or ABSENT.
describe() {  # tpu-vm or queued-resources
    local format='value(state)'
    [ "$1" = tpu-vm ] || format='value(state.state)'
    if ! tpu "$1" describe "$name" --format="$format" 2> "$scratch/describe"; then
        grep -qi 'not.found' "$scratch/describe" || { cat "$scratch/describe" >&2; return 1; }
        echo ABSENT
    elif [ -n "$dry_run" ]; then
        echo ABSENT
    fi
}

tpu_state() {
    local state nodes
    if [ -z "$queued" ]; then describe tpu-vm; return; fi
    state=$(describe queued-resources) || return
    if [ "$state" = ACTIVE ]; then  # a slice may be gone already
        nodes=$(tpu tpu-vm list --format='value(name.basename(),state)') || return
        nodes=$(awk -v name="$name" '$1 ~ "^" name "(-[0-9]+)?$" {print $2}' <<< "$nodes")
        state=$(grep -m 1 . <<< "${nodes//READY/}" || echo READY)
    fi
    echo "$state"
}

create() {
    local flags=(--accelerator-type="$type" ${spot:+--spot}) more
    read -ra more <<< "$create_flags"
    if [ -z "$queued" ]; then
        tpu tpu-vm create "$name" --version="$version" "${flags[@]}" ${more[@]+"${more[@]}"}
        return
    fi
    if [ "$slices" = 1 ]; then more+=(--node-id="$name"); else more+=(--node-count="$slices" --node-prefix="$name"); fi
    tpu queued-resources create "$name" --runtime-version="$version" "${flags[@]}" "${more[@]}"
}

delete() {  # the queued resource with its nodes, and a node without one
    local found='' kind
    for kind in queued-resources tpu-vm; do
        if [ "$(describe "$kind")" != ABSENT ] || [ -n "$dry_run" ]; then
            found=yes
            if [ "$kind" = tpu-vm ]; then tpu tpu-vm delete "$name"; else tpu "$kind" delete "$name" --force; fi
        fi
    done
    if [ -n "$found" ]; then note "$name is deleted"; else note "there is no TPU $name in $zone"; fi
}

ensure_ready() {
    local state before='' since=$SECONDS created=''
    while :; do
        if ! state=$(tpu_state); then
            [ -n "$known" ] || fail "gcloud could not describe $name"
            sleep "$poll"  # the network may come back
            continue
        fi
        known=yes
        case $state in
            READY) return ;;
            ABSENT)
                offset=0
                note "creating $name ($type) in $zone"
                if create 2> "$scratch/error"; then created=yes
                elif grep -qiE 'capacity|stockout|enough resources|unavailable|internal error' "$scratch/error"; then
                    say "$zone has no capacity for $type now; trying again (--queued waits in Google's queue instead)"
                    sleep "$poll" "$poll" "$poll"
                else cat "$scratch/error" >&2; fail "gcloud could not create $name"
                fi ;;
            FAILED | PREEMPTED | TERMINATED | SUSPENDED)
                [ "$state$created" != FAILEDyes ] || fail "Google could not create $name; \`gcloud compute tpus" \
                    "queued-resources describe $name --zone=$zone\` says why, and --delete removes it"
                say "$name is $state; deleting it to create it again"
                delete ;;
            STOPPED) tpu tpu-vm start "$name" ;;
            HIDDEN | HIDING | UNHIDING | UNKNOWN | '') fail "$name is in state '$state'; repair it by hand" ;;
            *)
                [ "$state" = "$before" ] || say "$name is $state; waiting"
                before=$state
                if [ $((SECONDS - since)) -ge 600 ]; then since=$SECONDS before=''; fi  # says that it still waits
                sleep "$poll" ;;
        esac
        [ -z "$dry_run" ] || return 0
    done
}

# ssh or scp on one worker, SLICE/WORKER, or all.
workers() {
    local where=$1 verb=$2 group=tpu-vm node=()
    shift 2
    if [ "$slices" -gt 1 ]; then group=queued-resources node=(--node="${where%/*}"); fi
    tpu "$group" "$verb" "$@" "${node[@]}" --worker="${where#*/}" ${internal_ip:+--internal-ip}
}
on() { workers "$1" ssh "$name" --command="$(quoted bash dlm_worker.sh "${@:2}")"; }
copy() { workers all scp "$@"; }

# Tries a command on all workers up to three times, as ssh to a new machine fails at first; 1 if the TPU is gone.
reach() {
    local attempt code state
    for attempt in 1 2 3; do
        code=0
        "$@" 2> "$scratch/error" || code=$?
        [ "$code" != 0 ] || return 0
        state=$(tpu_state) || true
        [ "$state" = READY ] || return 1
        if [ "$code" != 255 ] || [ "$attempt" = 3 ]; then break; fi  # 255: ssh itself
        sleep "$poll"
    done
    tail -n 20 "$scratch/error" >&2
    [ "$code" != 3 ] || exit 1  # another training runs there; do not stop it
    on all stop 120 > /dev/null 2>&1 || true
    fail "'$*' failed on $name with $code; its workers are stopped"
}

start() {
    local from=() files=("$parcel/dlm_worker.sh")
    run cp "$root/launch/tpu_worker.sh" "$parcel/dlm_worker.sh"
    if [ -n "$env_file" ]; then
        run install -m 600 "$env_file" "$parcel/dlm_env_file"
        files+=("$parcel/dlm_env_file")
    fi
    if [ -n "$repo" ]; then from=("$repo" "$commit")
    else
        run git -C "$root" archive --format=tar.gz --output="$parcel/dlm_jax.tar.gz" "${commit:-HEAD}" ||
            fail "there is no commit ${commit:-HEAD} in $root to send; name one with --commit, or --repo and --commit"
        files+=("$parcel/dlm_jax.tar.gz")
    fi
    reach copy "${files[@]}" "$name:" || return
    note "installing on all workers of $name"
    reach on all install "$extras" ${from[@]+"${from[@]}"} && reach on all start "${train[@]}"
}

show_log() {
    on 0/0 log "$offset" > "$scratch/log" 2> /dev/null || return 0
    if read -r offset < "$scratch/log"; then tail -n +2 "$scratch/log"; fi
}

# Follows the training to its end and sets $code to its exit code, "preempted" or "lost".
follow() {
    local failures=0 lines seen='' state missing
    while :; do
        code=0
        lines=$(on all status 2> "$scratch/error") || code=$?
        if [ "$code" = 0 ]; then failures=0
        elif [ "$code" = 127 ]; then code=preempted; return  # a worker without the script: Google replaced its machine
        else
            state=$(tpu_state 2> /dev/null) || state=unknown
            case $state in
                READY) failures=$((failures + 1)) ;;
                unknown) note "gcloud cannot reach Google now; trying again" ;;  # the training runs without this script
                *) code=preempted; return ;;
            esac
        fi
        show_log
        [ -z "$dry_run" ] || { code=0; return; }
        lines=$(grep '^dlm-worker ' <<< "$lines" | sort -u || true)
        if [ "$failures" -ge 3 ]; then
            tail -n 5 "$scratch/error" >&2
            missing=$(comm -23 <(echo "$seen") <(cut -d ' ' -f 2 <<< "$lines") | xargs)
            on all stop 120 > /dev/null 2>&1 || true
            fail "worker ${missing:-of $name} cannot be reached by ssh; the others are stopped"
        elif [ "$failures" = 0 ] && [ -n "$lines" ]; then
            seen=$(cut -d ' ' -f 2 <<< "$lines")
            if grep -qvE ' (running|exited 0)$' <<< "$lines"; then judge; return; fi
            if [[ $lines != *running* ]]; then code=0; return; fi
        fi
        sleep "$poll"
    done
}

# When one worker has ended: stops the others, reports which one it was, and sets $code to its exit code.
judge() {
    local lines worker
    sleep "$poll"  # so that the cause has been recorded, not only its first consequence
    lines=$(on all status 2> /dev/null | grep '^dlm-worker ' | sort || true)
    on all stop 120 > /dev/null 2>&1 || true
    show_log
    # First codes that forbid a restart, then those that are causes, then those that follow from another worker's death.
    read -r _ worker _ code < <(
        set +e
        grep -E ' exited [12]$' <<< "$lines"
        grep -vE ' (running|exited (0|1|2|75|76))$' <<< "$lines"
        grep -E ' exited (75|76)$' <<< "$lines" | sort -rk 4
    ) || true
    code=${code:-lost}
    say "worker ${worker:-of $name} ended with $code ($(describe_code "$code")); its log ends:"
    on "${worker:-0/0}" log 2> /dev/null | tail -n +2 | sed "s|^|    $worker: |" >&2 || true
}

require_ready() {
    state=$(tpu_state) || fail "gcloud could not describe $name"
    [ "$state" = READY ] || [ -n "$dry_run" ] || fail "$name in $zone is $state${queued:+ (a queued resource)}"
}

finish() {  # CODE
    if [ -n "$delete_after" ]; then delete; else note "$name is still there and costs money; --delete removes it"; fi
    exit "$1"
}

check_arguments
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'say "no longer following; the training on $name continues (--follow, --stop, --delete)"; exit 130' INT
parcel=$scratch  # the files to send to the workers
if [ -n "$dry_run" ] && [ "$action" = train ]; then parcel=${TMPDIR:-/tmp}/dlm-$name; run mkdir -p "$parcel"; fi
offset='' known=''
case $action in
    delete) delete ;;
    status) require_ready; on all status; show_log ;;
    stop) require_ready; on all stop 300 130; finish 0 ;;  # 130: a script that follows it does not restart it
    follow)
        require_ready
        follow
        [ "$code" != preempted ] || fail "$name was preempted; give the full command again to resume"
        exit "${code/lost/1}" ;;
    train)
        [ -n "$repo$commit" ] || git -C "$root" diff --quiet HEAD || note "uncommitted changes are not sent"
        restarts=0
        while :; do
            ensure_ready
            if start; then follow; else code=preempted; fi
            case $code in
                preempted) say "$name was preempted or restarted; resuming from the last checkpoint"; continue ;;
                0) note "the training is done"; finish 0 ;;
            esac
            if ! should_restart "$code" || [ "$restarts" -ge "$max_restarts" ]; then
                say "the training ended with $code ($(describe_code "$code")) after $restarts restarts"
                finish "${code/lost/1}"
            fi
            restarts=$((restarts + 1))
            say "restart $restarts of $max_restarts"
        done ;;
esac
