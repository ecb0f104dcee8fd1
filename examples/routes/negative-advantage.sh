#!/usr/bin/env bash
# Negative advantage: as the bridge (1H), but after the warm-up no teacher is asked: every token that the student samples gets the same
# advantage, -1 (arXiv 2608.31046). Options are those of OPD. Where these make several updates a step, the clip range bounds each.
# Labels are given, as s2d grpo wants them, and not looked at.
source "$(dirname "$0")/common.sh"

rl teacher-1H "$teacher" "$half1" "${teacher_rl[@]}"
warm_up bridge-1H "$out/teacher-1H" "$half1"
evaluate warmup-1H "$out/bridge-1H-warmup" "warm-up alone (1H)"
PYTHONPATH=$(cd "$(dirname "$0")" && pwd)${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
run negative "${launch[@]}" grpo --seed "$seed" --model "$out/bridge-1H-warmup" "$half1" "${sampler[@]}" "${sampling[@]}" "${grading[@]}" \
    --reward python:fixed_reward:minus_one --advantage reward --aggregate token "${trainer[@]}" "${opd[@]}" "$out/negative"
evaluate negative "$out/negative" "one negative advantage after the warm-up (1H)"
