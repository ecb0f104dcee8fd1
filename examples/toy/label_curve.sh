#!/usr/bin/env bash
# The picture at the top of the README: accuracy of the toy student against labels, by GRPO of its own and by way of a teacher.
#
#     examples/toy/label_curve.sh [FOLDER] [SEEDS] [PICTURE]      runs/label-curve, 5, FOLDER/label-curve.svg
#
# Each seed is a process of its own, as many side by side as there are cores. Run it again after an interruption and it goes on where it
# was; with all runs there it only draws.
set -euo pipefail

out=${1:-runs/label-curve}
seeds=${2:-5}
picture=${3:-$out/label-curve.svg}
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=1
mkdir -p "$out"

for ((seed = 0; seed < seeds; seed++)); do
    echo "'$here/../routes/label-curve.sh' '$here/settings.sh' '$out' $seed > '$out/seed-$seed.log' 2>&1"
done | "$here/../routes/side_by_side.sh"
s2d report "$out"/seed-*/eval/*-sampled --label-curve "$picture" --overwrite
