#!/usr/bin/env bash
# The parts of an array of rollouts, one after the other, are the rollouts; then they are graded:  sbatch merge.sh FOLDER
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
source "$S2D_SLURM/common.sh"

cat "$1"/part-*.jsonl > "$1/rollouts.jsonl.partial"
mv "$1/rollouts.jsonl.partial" "$1/rollouts.jsonl"
run s2d verify "$1/rollouts.jsonl" "${verify[@]}" -o "$1/graded.jsonl" --resume
