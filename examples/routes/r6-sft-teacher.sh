#!/usr/bin/env bash
# R6, SFT teacher: labels 1H choose the right ones among the teacher's own samples; it is trained on these, without RL.
source "$(dirname "$0")/common.sh"

rollouts teacher-own "$teacher" "$half1"
grade teacher-own
imitate teacher-sft "$teacher" "$out/teacher-own-graded.jsonl" --only-correct
bridge bridge-sft "$out/teacher-sft" "$half1"
evaluate bridge-sft "$out/bridge-sft" "bridge from the SFT teacher (1H), then nothing"
rl r6 "$out/bridge-sft" "$half2" "${student_rl[@]}"
evaluate r6 "$out/r6" "R6 bridge from the SFT teacher, GRPO on 2H"
