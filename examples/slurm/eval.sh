#!/usr/bin/env bash
# avg@k of a checkpoint or a run's latest:  sbatch eval.sh MODEL PROBLEMS FOLDER
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
source "$S2D_SLURM/common.sh"

run s2d eval --model "$1" "$2" "${eval[@]}" -o "$3" --resume
