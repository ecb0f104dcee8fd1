#!/usr/bin/env bash
# One part of the rollouts of a model:  sbatch --array=1-N rollout.sh MODEL PROBLEMS FOLDER
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
source "$S2D_SLURM/common.sh"

mkdir -p "$3"
run s2d rollout --model "$1" "$2" "${rollout[@]}" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" \
    -o "$3/part-$(printf %04d "$SLURM_ARRAY_TASK_ID").jsonl" --resume
