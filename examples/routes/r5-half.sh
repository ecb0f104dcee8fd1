#!/usr/bin/env bash
# R5-half: labels 1H go to the teacher, the bridge, then fresh labels 2H to the student.
source "$(dirname "$0")/common.sh"

rl teacher-1H "$teacher" "$half1" "${teacher_rl[@]}"
bridge bridge-1H "$out/teacher-1H" "$half1"
evaluate bridge-1H "$out/bridge-1H" "bridge (1H), then nothing"
rl r5 "$out/bridge-1H" "$half2" "${student_rl[@]}"
evaluate r5 "$out/r5" "R5 bridge (1H), GRPO on 2H"
