# Settings of every job in this folder. Copy the file, edit the copy, and name it: S2D_ENVIRONMENT=mine.sh ./submit.sh
# shellcheck shell=bash disable=SC2034  # read by the scripts that source it

# Where s2d is: activate its environment here, or load the site's modules.
# source /shared/s2d/.venv/bin/activate
# export HF_HOME=/shared/hub

# What is trained on what; paths that every host sees.
teacher=Qwen/Qwen3-8B
student=Qwen/Qwen3-1.7B
labelled=problems/1H.jsonl
test_problems=test.jsonl
out=/shared/runs/qwen3

# Slurm: options of every job, of those with GPUs, and of the training on one or two hosts.
slurm=(--time 24:00:00)
gpu=(--gpus-per-node 1)
training_nodes=(--nodes 1 --gpus-per-node 8)
shards=8 # array tasks that sample side by side

# How trainers start: on one host, or with two-nodes-fsdp2.yaml on two.
config=examples/configs/eight-gpus-fsdp2.yaml
launch=(accelerate launch --config_file "$config")
port=29500

# Settings of the stages; the same in all of them where two runs are to be compared.
rollout=(-n 8 --max-tokens 16384 --engine vllm)
trainer=(--lr 1e-6 --max-tokens 16384 --gradient-checkpointing --save-every 30m)
grpo=(--kl-coef 5e-4)
warmup=(--lr 1e-6 --gradient-checkpointing --save-every 30m)
opd=()
verify=()
eval=(-k 16 --max-tokens 16384 --engine vllm)
