#!/usr/bin/env bash
# R1, cold GRPO: all labels go to the student itself.
source "$(dirname "$0")/common.sh"

rl student-rl "$student" "$both" "${cold_rl[@]}"
evaluate r1 "$out/student-rl" "R1 GRPO of the student"
