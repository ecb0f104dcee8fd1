#!/usr/bin/env bash
# The label curve: as many labels to the student's own RL, and to a teacher's and by the bridge to the student:
#
#     label-curve.sh SETTINGS OUT [SEED]
#
# `curve_counts` in SETTINGS, or COUNTS="32 64 128", says how many. The first N problems are taken, of both halves in turn; where
# SETTINGS counts in --steps, every run makes as many updates whatever N is. Over all seeds in OUT:
#
#     s2d report OUT/seed-*/eval/*-sampled --label-curve curve.svg
source "$(dirname "$0")/common.sh"

mkdir -p "$out/problems"
for count in ${COUNTS:-${curve_counts:?}}; do
    problems=$out/problems/$count.jsonl
    [ -e "$problems" ] || head -n "$count" <(paste -d '\n' "$half1" "$half2") > "$problems"
    rl "direct-$count" "$student" "$problems" "${cold_rl[@]}"
    evaluate "direct-$count" "$out/direct-$count" "GRPO of the student"
    rl "teacher-$count" "$teacher" "$problems" "${teacher_rl[@]}"
    bridge "bridge-$count" "$out/teacher-$count" "$problems"
    evaluate "bridge-$count" "$out/bridge-$count" "RL teacher and bridge"
done
