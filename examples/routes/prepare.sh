#!/usr/bin/env bash
# DAPO-Math-17k, without duplicates and without problems of the evaluation sets, in two random halves:  prepare.sh [FOLDER]
set -euo pipefail

data=${1:-data/dapo}
s2d prepare BytedTsinghua-SIA/DAPO-Math-17k --exclude math-500 --exclude HuggingFaceH4/aime_2024 --exclude math-ai/aime25 \
    --split 1H=0.5,2H=0.5 -o "$data"
cat "$data/1H.jsonl" "$data/2H.jsonl" > "$data/both.jsonl"
