# The paper's second family for ../routes: Llama-3.1-8B-Instruct from Llama-3.3-70B-Instruct, measured on MATH-500. For hosts
# with several GPUs; see ../PLANNING.md for what they need. The settings are those of ../qwen3, for the same reasons; launch starts
# eight processes, among which models are split.
# shellcheck shell=bash disable=SC2034,SC2154  # read by routes/common.sh
teacher=${TEACHER:-meta-llama/Llama-3.3-70B-Instruct}
student=${STUDENT:-meta-llama/Llama-3.1-8B-Instruct}
data=${DATA:-data/dapo} # ../routes/prepare.sh makes it
half1=$data/1H.jsonl
half2=$data/2H.jsonl
both=$data/both.jsonl
tests=(math500)

launch=(accelerate launch --config_file "$(dirname "${BASH_SOURCE[0]}")/../configs/eight-gpus-fsdp2.yaml" -m s2dcli)
sampler=(--engine vllm)
sampling=(--max-tokens 16384)
samples=(-n 8)
grading=()
cache=(--keep top-k --top-k 128)
trainer=(--lr 1e-6 --gradient-checkpointing --save-every 30m)
grpo=(-n 8 --max-prompt-tokens 3072 --mini-batch-size 64 --kl-coef 5e-4 --clip-low 0.2 --clip-high 0.2)
cold_rl=(--epochs 10)
teacher_rl=(--epochs 10)
student_rl=(--epochs 1)
warmup=(--epochs 1 --mini-batch-size 64)
opd=(--epochs 1 -n 8 --max-prompt-tokens 2048 --mini-batch-size 64)
evaluations=(sampled)
eval_sampled=(-k 16 --max-tokens 16384)
