#!/usr/bin/env bash
# R7, replay control: as R5, but the student's RL gets the labels 1H again, in the same number of updates.
source "$(dirname "$0")/common.sh"

rl teacher-1H "$teacher" "$half1" "${teacher_rl[@]}"
bridge bridge-1H "$out/teacher-1H" "$half1"
rl r7 "$out/bridge-1H" "$half1" "${student_rl[@]}"
evaluate r7 "$out/r7" "R7 bridge (1H), GRPO on 1H again"
