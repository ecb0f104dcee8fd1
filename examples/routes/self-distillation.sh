#!/usr/bin/env bash
# Self-distillation: no teacher. Labels 1H choose the right ones among the student's own samples, and it imitates these (rejection
# sampling, RFT); then GRPO on 2H, as in R5. Without a choice there would be nothing to learn: from the student itself as the
# teacher the gradient of either KL is zero.
source "$(dirname "$0")/common.sh"

graded self "$student" "$half1"
imitate self-1H "$student" "$out/self-graded.jsonl" --only-correct
evaluate self-1H "$out/self-1H" "self-distillation (1H)"
rl self "$out/self-1H" "$half2" "${student_rl[@]}"
evaluate self "$out/self" "self-distillation (1H), GRPO on 2H"
