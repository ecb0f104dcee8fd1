#!/usr/bin/env bash
# Wrong rollouts: the bridge with a warm-up on wrong rollouts of the RL teacher (1H) only, and with one on as many of any, right or
# wrong, spread evenly over the same samples (arXiv 2608.06802 finds little difference). OPD is the same for both. Needs jq.
source "$(dirname "$0")/common.sh"

rl teacher-1H "$teacher" "$half1" "${teacher_rl[@]}"
graded many "$out/teacher-1H" "$half1"
jq -c 'select(.label == false)' "$out/many-graded.jsonl" > "$out/wrong.jsonl"
awk -v keep="$(wc -l < "$out/wrong.jsonl")" -v of="$(wc -l < "$out/many-graded.jsonl")" 'int(NR * keep / of) > int((NR - 1) * keep / of)' \
    "$out/many-graded.jsonl" > "$out/any.jsonl"
for chosen in wrong any; do
    learn "$chosen" "$out/teacher-1H" "$out/$chosen.jsonl"
    distil "$chosen" "$out/teacher-1H" "$out/$chosen-warmup" "$half1"
    evaluate "$chosen" "$out/$chosen" "bridge (1H) after a warm-up on $chosen rollouts"
done
