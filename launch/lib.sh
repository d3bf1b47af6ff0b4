# shellcheck shell=bash disable=SC2034
# Functions for the scripts in this folder, which source it.
#   say SENTENCE...                   prints to stderr, so that stdout has only the output
#   fail SENTENCE...                  says it and exits with 1; misuse: with 2
#   note SENTENCE...                  says it, except under --dry-run, where it would not be true
#   parse_flags VALUES SWITCHES ACTIONS ARGUMENT...
#                                     reads --name=value or --name value, --switch and --action until --, into variables
#                                     of these names and $action; what comes after -- goes into the array $train.
#                                     A dash in a name may be written as an underscore.
#   run COMMAND...                    runs it, or prints it under --dry-run, quoted, to be pasted
#   argument_of NAME ARGUMENT...      the value of --NAME=VALUE or --NAME VALUE
#   check_train_arguments ARGUMENT... checks the arguments of `dlm train` before any machine is requested; sets $workdir
#   should_restart CODE               whether the exit code of `dlm train` asks for a restart
#   train_with_restarts MAX COMMAND...   runs it here with up to MAX restarts; returns the last exit code
#   describe_code CODE                prints the exit code in words

exec 3>&1  # where --dry-run prints, also from inside $(...)

say() { echo "$(basename "$0"): $*" >&2; }
fail() { say "$@"; exit 1; }
misuse() { say "$*${see_help- (see --help)}"; exit 2; }
note() { [ -n "${dry_run:-}" ] || say "$@"; }

show_help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

parse_flags() {
    local values=" $1 " switches=" $2 " actions=" $3 " flag
    shift 3
    train=()
    while [ $# -gt 0 ]; do
        flag=${1%%=*} flag=${flag#--} flag=${flag//-/_}
        case $1 in
            --) shift; train=("$@"); return ;;
            --help | -h) show_help; exit 0 ;;
            --*=*) [[ $values == *" $flag "* ]] ||
                       misuse "there is no flag ${1%%=*}=; arguments of \`dlm train\` come after --"
                   [ -n "${1#*=}" ] || misuse "${1%%=*} is empty"
                   printf -v "$flag" %s "${1#*=}" ;;
            --*) if [[ $switches == *" $flag "* ]]; then printf -v "$flag" yes
                 elif [[ $actions == *" $flag "* ]]; then action=$flag
                 elif [[ $values == *" $flag "* ]]; then
                     [ -n "${2:-}" ] || misuse "$1 needs a value"
                     printf -v "$flag" %s "$2"
                     shift
                 else misuse "there is no flag $1; arguments of \`dlm train\` come after --"
                 fi ;;
            *) misuse "unexpected '$1'; arguments of \`dlm train\` come after --" ;;
        esac
        shift
    done
}

run() {
    if [ -z "${dry_run:-}" ]; then "$@"; else quoted "$@" >&3; fi
}

quoted() {
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
}

argument_of() {
    local name=$1
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            "--$name="*) echo "${1#*=}"; return ;;
            "--$name") echo "${2:-}"; return ;;
        esac
        shift
    done
}

check_train_arguments() {
    [ $# -gt 0 ] || misuse "nothing to train: \`dlm train\` needs arguments, at least --config= and --workdir="
    [ -n "$(argument_of config "$@")" ] || misuse "--config=RECIPE is missing among the arguments of \`dlm train\`"
    workdir=$(argument_of workdir "$@")
    [ -n "$workdir" ] || misuse "--workdir=DIR is missing among the arguments of \`dlm train\`"
}

check_number() {  # FLAG VALUE LEAST
    if ! [[ $2 =~ ^[0-9]+$ ]] || [ "$2" -lt "$3" ]; then
        misuse "--$1 must be an integer of at least $3, got '$2'"
    fi
}

should_restart() {
    case $1 in 0 | 1 | 2 | 130) return 1 ;; esac  # done, failed, wrong arguments, interrupted by the user
}

describe_code() {
    case $1 in
        0) echo "done" ;;
        1) echo "failed" ;;
        2) echo "wrong arguments" ;;
        75) echo "stopped by SIGTERM after saving" ;;
        76) echo "another process of the run died" ;;
        130) echo "stopped by the user" ;;
        lost) echo "gone without an exit code" ;;
        *) local signal
           if [ "$1" -le 128 ] || ! signal=$(kill -l "$1" 2> /dev/null); then echo died
           else echo "killed by SIG$signal"
           fi ;;
    esac
}

train_with_restarts() {
    local max=$1 code restarts=0 child='' signal=''
    shift
    # A signal to this script goes on to the training, which saves, and rules out a restart. Job control gives the
    # training its own process group, in which bash does not make it ignore SIGINT.
    set -m
    trap 'signal=TERM' TERM
    trap 'signal=INT' INT
    while :; do
        "$@" < /dev/null &
        child=$!
        while :; do  # a signal interrupts the wait
            code=0
            wait "$child" || code=$?
            kill -0 "$child" 2> /dev/null || break
            kill -s "${signal:-CONT}" "$child" 2> /dev/null || true
        done
        if [ -n "$signal" ] || ! should_restart "$code" || [ "$restarts" -ge "$max" ]; then break; fi
        restarts=$((restarts + 1))
        say "the training ended with $code ($(describe_code "$code")); restart $restarts of $max"
        sleep "${DLM_LAUNCH_POLL:-5}"
    done
    set +m
    trap - TERM INT
    [ "$code" = 0 ] || say "the training ended with $code ($(describe_code "$code")) after $restarts restarts"
    return "$code"
}
