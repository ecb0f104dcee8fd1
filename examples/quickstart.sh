#!/usr/bin/env bash
# The method's main comparison, on a CPU, in minutes.
#
#     examples/quickstart.sh [FOLDER] [short]        FOLDER is runs/quickstart by default
#
# 512 labelled problems are there to make a small student good at arithmetic (examples/toy). Where
# should their reward go?
#
#     direct GRPO         to the student itself
#     raw-teacher bridge  nowhere: the student learns from a larger teacher as it is
#     RL-teacher bridge   to the teacher, and the student learns from that
#
# A bridge is two stages: forward KL on the teacher's rollouts, then on-policy distillation on the
# student's own. It looks at no label. `short` takes a few steps of everything, to see that it runs.
#
# Direct GRPO has the learning rate and number of steps that are best on validation problems (toy/tune.sh).
# The routes run in two processes side by side, one thread each; at the end there is a table, and a page
# for a browser.
set -euo pipefail

out=${1:-runs/quickstart}
form=${2:-full}

case $form in
    full)  teacher_steps=60 student_steps=400 warmup_steps=150 opd_steps=60 num_test=320 ;;
    short) teacher_steps=3  student_steps=3   warmup_steps=3   opd_steps=3  num_test=16 ;;
    *)     echo "usage: $0 [FOLDER] [short]" >&2; exit 2 ;;
esac
if [ -e "$out" ]; then
    echo "$0: $out exists; remove it or name another folder" >&2
    exit 2
fi

toy=$(cd "$(dirname "$0")" && pwd)/toy
labelled=$toy/problems/1H.jsonl
test=$out/test.jsonl
mkdir -p "$out/logs"
head -n "$num_test" "$toy/problems/test.jsonl" > "$test"

# The models are tiny: more threads would only wait for each other.
export OMP_NUM_THREADS=1

# Settings that routes share
sampling=(--max-tokens 16)
grading=(--workers 1)
optimizer=(--adam-beta2 0.95)
grpo=(--problems-per-step 32 -n 8 --warmup-steps 5 "${sampling[@]}" "${grading[@]}" "${optimizer[@]}")
distil=(--lr 1e-3 --schedule cosine --min-lr-ratio 0.1 --warmup-steps 10 "${optimizer[@]}")

say() {
    printf '%4d s  %s\n' "$SECONDS" "$*"
}

# run NAME COMMAND...: run a command with its output in logs/NAME.log; if it fails, show the end of that.
run() {
    local log=$out/logs/$1.log
    shift
    "$@" > "$log" 2>&1 && return
    printf '\nfailed: %s\n' "$*" >&2
    tail -n 20 "$log" >&2
    return 1
}

# evaluate CHECKPOINT FOLDER NAME: four samples a problem at temperature 1, and one greedy answer.
evaluate() {
    run "$2-sampled" s2d eval --model "$1" "$test" -k 4 "${sampling[@]}" "${grading[@]}" -o "$out/eval/$2-sampled" --name "$3"
    run "$2-greedy" s2d eval --model "$1" "$test" --temperature 0 "${sampling[@]}" "${grading[@]}" -o "$out/eval/$2-greedy" --name "$3"
}

# bridge TEACHER FOLDER: the student learns from TEACHER's rollouts, then from TEACHER on its own.
bridge() {
    run "$2-rollout" s2d rollout --model "$1" "$labelled" -n 2 "${sampling[@]}" -o "$out/$2/rollouts.jsonl"
    run "$2-warmup" s2d fkl-warmup --teacher "$1" --student "$toy/student" --rollouts "$out/$2/rollouts.jsonl" \
        --steps "$warmup_steps" --mini-batch-size 128 "${distil[@]}" --lr 2e-3 -o "$out/$2/warmup"
    run "$2-opd" s2d opd --teacher "$1" --student "$out/$2/warmup" "$labelled" \
        --steps "$opd_steps" --problems-per-step 128 -n 1 "${sampling[@]}" "${distil[@]}" -o "$out/$2/opd"
}

rl_teacher_routes() {
    say "RL teacher: GRPO on the labelled problems, $teacher_steps steps"
    run rl-teacher s2d grpo --model "$toy/teacher" "$labelled" --steps "$teacher_steps" --lr 2e-4 "${grpo[@]}" -o "$out/rl-teacher"
    say "RL-teacher bridge: forward-KL warm-up and on-policy distillation"
    bridge "$out/rl-teacher" rl-bridge
    say "RL teacher, RL-teacher bridge and the models at the start: evaluation"
    evaluate "$out/rl-teacher" rl-teacher "RL teacher"
    evaluate "$out/rl-bridge/opd" rl-bridge "RL-teacher bridge"
    evaluate "$toy/teacher" raw-teacher "teacher at the start"
    evaluate "$toy/student" raw-student "student at the start"
}

other_routes() {
    say "direct GRPO: the student, on the labelled problems, $student_steps steps"
    run direct s2d grpo --model "$toy/student" "$labelled" --steps "$student_steps" --lr 4e-4 "${grpo[@]}" -o "$out/direct"
    say "raw-teacher bridge: the same as the RL-teacher bridge, from the teacher at the start"
    bridge "$toy/teacher" raw-bridge
    say "direct GRPO and raw-teacher bridge: evaluation"
    evaluate "$out/direct" direct "direct GRPO"
    evaluate "$out/raw-bridge/opd" raw-bridge "raw-teacher bridge"
}

# Two background jobs, each a process group of its own (-m), so that neither outlives the script.
set -m
rl_teacher_routes &
jobs=($!)
other_routes &
jobs+=($!)
trap 'kill -- "${jobs[@]/#/-}" 2> /dev/null || true' EXIT
for _ in "${jobs[@]}"; do
    wait -n || exit 1  # the first to fail stops the other
done

say "done; checkpoints and logs are in $out"
echo
s2d report "$out"/eval/{raw-teacher,rl-teacher,raw-student,raw-bridge,direct,rl-bridge}-{sampled,greedy} --html "$out/report.html"
echo
s2d lineage "$out/rl-bridge/opd"
