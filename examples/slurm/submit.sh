#!/usr/bin/env bash
# The whole workflow as Slurm jobs that wait for each other:
#
#     S2D_ENVIRONMENT=mine.sh examples/slurm/submit.sh
#
#     teacher RL -> rollouts (array) -> merge, verify -> score -> warm-up -> OPD -> evaluation
#
# All state is in files under $out, and every job ends its command with --resume: a job that was preempted
# goes on where it stood, and submitting everything again runs what is not finished.
set -euo pipefail

S2D_SLURM=$(cd "$(dirname "$0")" && pwd)
S2D_ENVIRONMENT=$(realpath "${S2D_ENVIRONMENT:-$S2D_SLURM/environment.sh}")
export S2D_SLURM S2D_ENVIRONMENT
# shellcheck source=environment.sh
source "$S2D_ENVIRONMENT"
mkdir -p "$out/logs"

# submit NAME AFTER OPTIONS... -- SCRIPT ARGUMENTS...: print the id of a job that starts when AFTER has succeeded.
submit() {
    local name=$1 after=$2 options=()
    shift 2
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    [ -z "$after" ] || options+=(--dependency "afterok:$after" --kill-on-invalid-dep=yes)
    local script=$1
    shift
    sbatch --parsable --job-name "s2d-$name" --output "$out/logs/$name-%j.log" "${slurm[@]}" "${options[@]}" "$S2D_SLURM/$script" "$@"
}

rl=$(submit teacher "" "${training_nodes[@]}" -- train.sh grpo --model "$teacher" "$labelled" "${trainer[@]}" "${grpo[@]}" -o "$out/teacher")
parts=$(submit rollout "$rl" "${gpu[@]}" --array "1-$shards" -- rollout.sh "$out/teacher" "$labelled" "$out/rollouts")
graded=$(submit merge "$parts" -- merge.sh "$out/rollouts")
target=(--teacher "$out/teacher")
if s2d score --help > /dev/null 2>&1; then
    graded=$(submit score "$graded" "${gpu[@]}" -- score.sh "$out/teacher" "$out/rollouts/rollouts.jsonl" "$out/cache")
    target=(--cache "$out/cache")
fi
warm=$(submit warmup "$graded" "${training_nodes[@]}" -- train.sh fkl-warmup "${target[@]}" --student "$student" \
    --rollouts "$out/rollouts/rollouts.jsonl" "${warmup[@]}" -o "$out/warmup")
distilled=$(submit opd "$warm" "${training_nodes[@]}" -- train.sh opd --teacher "$out/teacher" --student "$out/warmup" "$labelled" \
    "${trainer[@]}" "${opd[@]}" -o "$out/opd")
submit eval-teacher "$rl" "${gpu[@]}" -- eval.sh "$out/teacher" "$test_problems" "$out/eval/teacher" > /dev/null
submit eval-student "$distilled" "${gpu[@]}" -- eval.sh "$out/opd" "$test_problems" "$out/eval/student"
