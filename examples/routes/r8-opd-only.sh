#!/usr/bin/env bash
# R8, OPD only: as R5, without the warm-up.
source "$(dirname "$0")/common.sh"

rl teacher-1H "$teacher" "$half1" "${teacher_rl[@]}"
distil opd-1H "$out/teacher-1H" "$student" "$half1"
evaluate opd-1H "$out/opd-1H" "OPD alone (1H), then nothing"
rl r8 "$out/opd-1H" "$half2" "${student_rl[@]}"
evaluate r8 "$out/r8" "R8 OPD alone (1H), GRPO on 2H"
