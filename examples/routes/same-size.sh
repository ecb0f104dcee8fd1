#!/usr/bin/env bash
# Same-size teacher: a copy of the student gets all labels (which is R1), and teaches the student as it was.
source "$(dirname "$0")/common.sh"

rl student-rl "$student" "$both" "${cold_rl[@]}"
bridge same-size "$out/student-rl" "$both"
evaluate same-size "$out/same-size" "bridge from an RL teacher of the same size"
