# What all routes share; every route sources it:  ROUTE.sh SETTINGS OUT [SEED]
#
# SETTINGS names models, problems and options (toy/settings.sh, qwen3/settings.sh, llama/settings.sh). OUT/seed-SEED
# gets a folder per model, rollout file, cache and evaluation. What routes have in common, such as the RL teacher of 1H, is
# made by the first and found there by the others, so routes with one OUT differ in nothing but what they are named after.
# Every command resumes: run a route again after an interruption and it goes on where it was.
# shellcheck shell=bash disable=SC2154  # SETTINGS sets models, problems and options
set -euo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    echo "usage: $0 SETTINGS OUT [SEED]" >&2
    exit 2
fi
seed=${3:-0}
out=$2/seed-$seed
# shellcheck source=/dev/null
source "$1"
mkdir -p "$out/logs"

# run NAME COMMAND...: run a command with its output in logs/NAME.log; if it fails, show the end of that. A command that has come to
# its end before is not run again: logs/NAME.done holds it. Remove that and --resume checks the output against its inputs.
run() {
    local log=$out/logs/$1.log complete=$out/logs/$1.done
    shift
    [ ! -e "$complete" ] || [ "$(< "$complete")" != "$*" ] || return 0
    printf '%5d s  %s\n' "$SECONDS" "${*:1:2} -> ${*: -1}"
    if "${@:1:$#-1}" -o "${*: -1}" --resume > "$log" 2>&1; then
        echo "$*" > "$complete"
        return
    fi
    printf '\nfailed: %s\n' "$* --resume" >&2
    tail -n 20 "$log" >&2
    return 1
}

# rl NAME MODEL PROBLEMS OPTIONS...: sparse-reward RL of a model.
rl() {
    local name=$1 model=$2 problems=$3
    shift 3
    run "$name" "${launch[@]}" grpo --seed "$seed" --model "$model" "$problems" "${sampler[@]}" "${sampling[@]}" "${grading[@]}" "${reward[@]}" \
        "${trainer[@]}" "${grpo[@]}" "$@" "$out/$name"
}

# rollouts NAME MODEL PROBLEMS: a model's samples, from which a student learns.
rollouts() {
    run "$1-rollouts" s2d rollout --seed "$seed" --model "$2" "$3" "${sampler[@]}" "${sampling[@]}" "${samples[@]}" "$out/$1-rollouts.jsonl"
}

# graded NAME MODEL PROBLEMS: samples and their verdicts, of which only some are learnt from: as many a problem as many_samples says.
graded() {
    local samples=("${many_samples[@]}")
    rollouts "$@"
    grade "$1"
}

# grade NAME: the verdicts on a model's samples.
grade() {
    run "$1-graded" s2d verify "$out/$1-rollouts.jsonl" "${grading[@]}" "${reward[@]}" "$out/$1-graded.jsonl"
}

# warm_up NAME TEACHER PROBLEMS: forward KL on the teacher's samples.
warm_up() {
    rollouts "$1" "$2" "$3"
    learn "$1" "$2" "$out/$1-rollouts.jsonl"
}

# learn NAME TEACHER ROLLOUTS: forward KL on given rollouts, from the teacher's distributions in a cache.
learn() {
    run "$1-cache" s2d score --model "$2" "$3" "${cache[@]}" "$out/$1-cache"
    run "$1-warmup" "${launch[@]}" fkl-warmup --seed "$seed" --student "$student" --cache "$out/$1-cache" --rollouts "$3" \
        "${trainer[@]}" "${warmup[@]}" "$out/$1-warmup"
}

# distil NAME TEACHER STUDENT PROBLEMS: on-policy distillation.
distil() {
    run "$1" "${launch[@]}" opd --seed "$seed" --teacher "$2" --student "$3" "$4" "${sampler[@]}" "${sampling[@]}" "${trainer[@]}" "${opd[@]}" "$out/$1"
}

# bridge NAME TEACHER PROBLEMS: warm-up and on-policy distillation of the student.
bridge() {
    warm_up "$1" "$2" "$3"
    distil "$1" "$2" "$out/$1-warmup" "$3"
}

# imitate NAME STUDENT ROLLOUTS OPTIONS...: supervised fine-tuning on sampled tokens.
imitate() {
    local name=$1 model=$2 rows=$3
    shift 3
    run "$name" "${launch[@]}" fkl-warmup --seed "$seed" --student "$model" --hard-labels --rollouts "$rows" "${trainer[@]}" "${warmup[@]}" "$@" "$out/$name"
}

# evaluate NAME MODEL TITLE: in every way that SETTINGS lists, e.g. sampled with the options of eval_sampled.
evaluate() {
    local way
    for way in "${evaluations[@]}"; do
        local -n options=eval_$way
        run "eval-$1-$way" s2d eval --seed "$seed" --model "$2" "${tests[@]}" --name "$3" "${sampler[@]}" "${grading[@]}" "${reward[@]}" "${options[@]}" \
            "$out/eval/$1-$way"
    done
}
