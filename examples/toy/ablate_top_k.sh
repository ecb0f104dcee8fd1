#!/usr/bin/env bash
# How many of the teacher's ids does distillation need? Final KL and accuracy of the toy student against k.
#
#     examples/toy/ablate_top_k.sh [FOLDER] [SEEDS] [KS] [short]      runs/top-k "0 1 2 3 4" "1 2 4 8 16 33"
#
# For each seed a teacher is trained by GRPO on 512 labelled problems, and its distributions on two rollouts a problem
# are cached once, all 33 ids of them. For each k the student is warmed up by forward KL on the k likeliest ids and one
# bucket for the rest (150 steps, --top-k of the same cache), then distilled on its own samples by reverse KL on the
# teacher's k likeliest (60 steps). The table has, on the held-out test problems and over the seeds, the exact
# KL(student || teacher) a token and avg@4 at temperature 1, each with the standard error over seeds. `short` takes a few
# steps of everything, to see that it runs.
set -euo pipefail

out=${1:-runs/top-k}
seeds=${2:-0 1 2 3 4}
ks=${3:-1 2 4 8 16 33}
case ${4:-full} in
    full)  teacher_steps=60 warmup_steps=150 opd_steps=60 num_test=320 ;;
    short) teacher_steps=2  warmup_steps=2   opd_steps=2  num_test=16 ;;
    *)     echo "usage: $0 [FOLDER] [SEEDS] [KS] [short]" >&2; exit 2 ;;
esac
if [ -e "$out" ]; then
    echo "$0: $out exists; remove it or name another folder" >&2
    exit 2
fi

toy=$(cd "$(dirname "$0")" && pwd)
labelled=$toy/problems/1H.jsonl
mkdir -p "$out"
head -n "$num_test" "$toy/problems/test.jsonl" > "$out/test.jsonl"
export OMP_NUM_THREADS=1  # the models are tiny: more threads would only wait for each other
sampling=(--max-tokens 16)
distil=(--schedule cosine --min-lr-ratio 0.1 --warmup-steps 10 --adam-beta2 0.95)

# measure CHECKPOINT FOLDER: the exact KL and avg@4 of a student of the teacher in $here, as two lines of JSON.
measure() {
    s2d opd -q --teacher "$here/teacher" --student "$1" "$out/test.jsonl" --lr 0 --steps 1 --problems-per-step "$num_test" -n 4 \
        "${sampling[@]}" -o "$2-kl" > "$2.json"
    s2d eval -q --model "$1" "$out/test.jsonl" -k 4 "${sampling[@]}" --workers 1 >> "$2.json"
}

for seed in $seeds; do
    here=$out/seed$seed
    mkdir -p "$here"
    s2d grpo -q --model "$toy/teacher" "$labelled" --steps "$teacher_steps" --lr 2e-4 --problems-per-step 32 -n 8 --warmup-steps 5 \
        --adam-beta2 0.95 "${sampling[@]}" --workers 1 --seed "$seed" -o "$here/teacher" > /dev/null
    s2d rollout -q --model "$here/teacher" "$labelled" -n 2 "${sampling[@]}" --seed "$seed" -o "$here/rollouts.jsonl"
    s2d score -q --model "$here/teacher" "$here/rollouts.jsonl" -o "$here/cache" > /dev/null
    for k in $ks; do
        s2d fkl-warmup -q --student "$toy/student" --cache "$here/cache" --rollouts "$here/rollouts.jsonl" --top-k "$k" --lr 2e-3 \
            --steps "$warmup_steps" --mini-batch-size 128 "${distil[@]}" --seed "$seed" -o "$here/warmup-$k" > /dev/null
        measure "$here/warmup-$k" "$here/warmup-$k"
        s2d opd -q --teacher "$here/teacher" --student "$here/warmup-$k" "$labelled" --estimator top-k --top-k "$k" --lr 1e-3 \
            --steps "$opd_steps" --problems-per-step 128 -n 1 "${sampling[@]}" "${distil[@]}" --seed "$seed" -o "$here/opd-$k" > /dev/null
        measure "$here/opd-$k" "$here/opd-$k"
        printf '%5d s  seed %s, k %s\n' "$SECONDS" "$seed" "$k" >&2
    done
done

python - "$out" "$seeds" "$ks" <<'PYTHON'
import json
import sys
from pathlib import Path

from s2dcli.stats import mean, standard_error

out, seeds, ks = Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split()
print("| k | KL after warmup | avg@4 | KL after OPD | avg@4 |\n|---:|---:|---:|---:|---:|")
for k in ks:
    cells = []
    for stage in ("warmup", "opd"):
        found = [[json.loads(line) for line in (out / f"seed{seed}" / f"{stage}-{k}.json").read_text().splitlines()] for seed in seeds]
        for values, scale, digits in (([kl["kl"] for kl, _ in found], 1, 4), ([result["avg_at_k"] for _, result in found], 100, 1)):
            cells.append(f"{scale * mean(values):.{digits}f} ± {scale * standard_error(values):.{digits}f}")
    print(f"| {k} | {' | '.join(cells)} |")
PYTHON
