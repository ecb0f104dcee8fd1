#!/usr/bin/env bash
# Every command of every route on tiny models, in minutes on a CPU, to see that it runs:  smoke.sh ARCHITECTURE SETTINGS OUT [ROUTE...]
#
# ARCHITECTURE (qwen3 or llama) is that of two random models with the toy family's tokenizer, which first learn from samples of the toy
# teacher how an answer looks. SETTINGS keeps its options; models, problems, rewards, lengths and counts are replaced. ROUTE is a script's name
# (r3-full); without any, all run, and the controls.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: $0 qwen3|llama SETTINGS OUT [ROUTE...]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
toy=$here/../toy
settings=$(realpath "$2")
mkdir -p "$3"
out=$(cd "$3" && pwd)
export OMP_NUM_THREADS=1

python "$here/tiny_models.py" "$1" "$toy/student" "$out/random"
head -n 8 "$toy/problems/1H.jsonl" > "$out/1H.jsonl"
head -n 8 "$toy/problems/2H.jsonl" > "$out/2H.jsonl"
cat "$out/1H.jsonl" "$out/2H.jsonl" > "$out/both.jsonl"
head -n 4 "$toy/problems/test.jsonl" > "$out/test.jsonl"
s2d rollout --model "$toy/teacher" "$toy/problems/2H.jsonl" -n 1 --max-tokens 16 -o "$out/samples.jsonl" --resume
for model in teacher student; do
    s2d fkl-warmup --student "$out/random/$model" --hard-labels --rollouts "$out/samples.jsonl" --steps 60 --lr 5e-3 -o "$out/$model" --resume
done

cat > "$out/settings.sh" << END
# shellcheck shell=bash disable=SC2034
source "$settings"
teacher=$out/teacher student=$out/student half1=$out/1H.jsonl half2=$out/2H.jsonl both=$out/both.jsonl tests=("$out/test.jsonl")
launch=(s2d)
sampler+=(--engine transformers)
sampling+=(--max-tokens 16)
samples+=(-n 4)
many_samples+=(-n 8) # some of them right
grading+=(--workers 1)
reward=(--reward exact) # sympy takes seconds to start
[[ " \${cache[*]} " != *" top-k "* ]] || cache+=(--top-k 8)
grpo+=(-n 4 --problems-per-step 4 --mini-batch-size 8)
cold_rl+=(--steps 1)
teacher_rl+=(--steps 1)
student_rl+=(--steps 1)
warmup+=(--steps 1 --mini-batch-size 8)
opd+=(--steps 1 -n 2 --problems-per-step 4 --mini-batch-size 4)
curve_counts="2 4"
for way in "\${evaluations[@]}"; do
    declare -n options=eval_\$way
    options+=(--max-tokens 16 -k 2)
done
END
if [ $# -eq 3 ]; then
    "$here/all.sh" "$out/settings.sh" "$out/routes"
    "$here/controls.sh" "$out/settings.sh" "$out/routes"
fi
for route in "${@:4}"; do
    "$here/$route.sh" "$out/settings.sh" "$out/routes"
done
