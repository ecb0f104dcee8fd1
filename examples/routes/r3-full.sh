#!/usr/bin/env bash
# R3-full: all labels go to the teacher; the bridge alone brings them to the student.
source "$(dirname "$0")/common.sh"

rl teacher-full "$teacher" "$both" "${teacher_rl[@]}"
evaluate teacher-full "$out/teacher-full" "RL teacher itself"
bridge r3 "$out/teacher-full" "$both"
evaluate r3 "$out/r3" "R3 bridge from the RL teacher"
