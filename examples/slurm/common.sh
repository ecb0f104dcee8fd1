# What the job scripts share; each sources it.
# shellcheck shell=bash

set -euo pipefail
# shellcheck source=environment.sh
source "$S2D_ENVIRONMENT"
mkdir -p "$out"

# run COMMAND...: run it so that it hears Slurm's warning before a time limit or a preemption (--signal B:TERM@120).
# s2d ends in good order on SIGTERM, with exit code 143; the job then goes back into the queue, and --resume goes on.
run() {
    local code=0
    trap 'kill -TERM "$child" 2> /dev/null' TERM
    "$@" &
    child=$!
    wait "$child" || code=$?
    if [ "$code" -gt 128 ] && kill -0 "$child" 2> /dev/null; then # the trap cut the wait short
        code=0
        wait "$child" || code=$?
    fi
    trap - TERM
    if [ "$code" -eq 143 ]; then
        echo "stopped by SIGTERM; requeueing job $SLURM_JOB_ID" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
