#!/usr/bin/env bash
# R2, teacher-sample SFT: labels 1H go to the teacher; the student imitates its samples, then gets RL on 2H.
source "$(dirname "$0")/common.sh"

rl teacher-1H "$teacher" "$half1" "${teacher_rl[@]}"
rollouts bridge-1H "$out/teacher-1H" "$half1"
imitate sft-1H "$student" "$out/bridge-1H-rollouts.jsonl"
evaluate sft-1H "$out/sft-1H" "SFT on samples of the RL teacher (1H)"
rl r2 "$out/sft-1H" "$half2" "${student_rl[@]}"
evaluate r2 "$out/r2" "R2 SFT on samples, GRPO on 2H"
