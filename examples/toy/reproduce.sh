#!/usr/bin/env bash
# All routes with the toy family, over training seeds and pre-training seeds, and what they say of the paper's claims:
#
#     examples/toy/reproduce.sh [FOLDER] [SEEDS] [FAMILIES]      runs/reproduce, 5 and 2 by default
#
# Family 0 is the one that is shipped; the others are pre-trained here with another seed (a minute each). Each seed is a process of
# its own, as many side by side as there are cores. Run it again after an interruption and it goes on where it was.
set -euo pipefail

out=${1:-runs/reproduce}
seeds=${2:-5}
families=${3:-2}
here=$(cd "$(dirname "$0")" && pwd)
routes=$here/../routes
export OMP_NUM_THREADS=1
mkdir -p "$out"

for ((family = 1; family < families; family++)); do
    [ -e "$out/toy-$family/student/model.safetensors" ] || python "$here/pretrain.py" --out "$out/toy-$family" --seed "$family"
done

for ((family = 0; family < families; family++)); do
    for ((seed = 0; seed < seeds; seed++)); do
        toy=$here
        ((family == 0)) || toy=$(realpath "$out/toy-$family")
        echo "TOY=$toy '$routes/all.sh' '$here/settings.sh' '$out/family-$family' $seed one > '$out/family-$family-seed-$seed.log' 2>&1"
    done
done | "$routes/side_by_side.sh"

for ((family = 0; family < families; family++)); do
    printf '\nFamily %s\n\n' "$family"
    python "$routes/table.py" "$out/family-$family"
    for way in sampled greedy; do
        printf '\nFamily %s, %s\n\n' "$family" "$way"
        python "$routes/claims.py" "$out/family-$family" "$way"
    done
done
