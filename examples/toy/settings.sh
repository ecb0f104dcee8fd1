# The toy family on a CPU, for ../routes: about a minute a route. One thread: more would only wait for each other.
# HALF=N takes the first N labelled problems of each half only: what is true of 512 need not be of 32. OPD_STEPS, STUDENT_STEPS and STUDENT_LR
# are those of OPD and of the RL of the student after it.
# shellcheck shell=bash disable=SC2034,SC2154  # read by routes/common.sh
toy=${TOY:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)} # another family: TOY=FOLDER of pretrain.py
export OMP_NUM_THREADS=1

teacher=$toy/teacher
student=$toy/student
half1=$toy/problems/1H.jsonl
half2=$toy/problems/2H.jsonl
both=$out/both.jsonl
tests=("$toy/problems/test.jsonl")
mkdir -p "$out"
if [ -n "${HALF:-}" ]; then
    head -n "$HALF" "$half1" > "$out/1H.jsonl"
    head -n "$HALF" "$half2" > "$out/2H.jsonl"
    half1=$out/1H.jsonl half2=$out/2H.jsonl
fi
[ -e "$both" ] || cat "$half1" "$half2" > "$both"

launch=(s2d)
sampler=()
sampling=(--max-tokens 16)
samples=(-n 2)
many_samples=(-n 16) # for controls, which learn from the wrong ones of a good model, or the right ones of a weak one
grading=(--workers 1)
reward=()
cache=(--keep hidden)
trainer=(--adam-beta2 0.95)
grpo=(--problems-per-step 32 -n 8 --warmup-steps 5)
cold_rl=(--steps 400 --lr 4e-4)
teacher_rl=(--steps 60 --lr 2e-4)
student_rl=(--steps "${STUDENT_STEPS:-80}" --lr "${STUDENT_LR:-1e-4}")
warmup=(--steps 150 --mini-batch-size 128 --lr 2e-3 --schedule cosine --min-lr-ratio 0.1 --warmup-steps 10)
opd=(--steps "${OPD_STEPS:-60}" --problems-per-step 128 -n 1 --lr 1e-3 --schedule cosine --min-lr-ratio 0.1 --warmup-steps 10)
evaluations=(sampled greedy)
curve_counts="32 64 128 256 512 1024"
eval_sampled=(-k 4 --max-tokens 16)
eval_greedy=(--temperature 0 --max-tokens 16)
