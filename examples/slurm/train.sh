#!/usr/bin/env bash
# A trainer on all GPUs of all hosts of the job:  sbatch train.sh grpo|fkl-warmup|opd ARGUMENTS...
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
source "$S2D_SLURM/common.sh"

if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # $SLURM_NODEID differs by host, so each expands it for itself.
    # shellcheck disable=SC2016
    run srun bash -c 'rank=$SLURM_NODEID; args=(); for arg; do args+=("${arg/@RANK@/$rank}"); done; exec "${args[@]}"' _ \
        "${launch[@]}" --machine_rank @RANK@ --main_process_ip "${hosts%%$'\n'*}" --main_process_port "$port" -m s2dcli "$@" --resume
else
    run "${launch[@]}" -m s2dcli "$@" --resume
fi
