#!/usr/bin/env bash
# The teacher's 128 likeliest tokens at every position of the rollouts:  sbatch score.sh TEACHER ROLLOUTS CACHE
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
source "$S2D_SLURM/common.sh"

run s2d score --model "$1" "$2" -o "$3" --keep top-k --top-k 128 --resume
