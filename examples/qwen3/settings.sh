# The paper's main rows for ../routes: Qwen3-1.7B from Qwen3-8B on DAPO-Math-17k. For hosts with GPUs: what it
# needs is in ../PLANNING.md. TEACHER=Qwen/Qwen3-14B is the paper's other column.
#
# From the paper (section on settings): lr 1e-6, KL coefficient 5e-4, clip 0.2, gradient clip 1, prompts of at most 3,072 tokens
# (2,048 in distillation), completions of at most 16,384, 8 rollouts a prompt and 1 epoch of distillation in mini-batches of 64,
# temperature 1, avg@16. Where it is silent: its mini-batch of 8 in RL is read as 8 problems (verl counts so), here 64 rollouts; 32 problems
# a step and -n 8 are s2d's defaults; the student's RL takes one epoch, as its problems are fresh; thinking is off, as completions of
# a thinking Qwen3 outgrow 16,384 tokens.
# shellcheck shell=bash disable=SC2034,SC2154  # read by routes/common.sh
teacher=${TEACHER:-Qwen/Qwen3-8B}
student=${STUDENT:-Qwen/Qwen3-1.7B}
data=${DATA:-data/dapo} # ../routes/prepare.sh makes it
half1=$data/1H.jsonl
half2=$data/2H.jsonl
both=$data/both.jsonl
tests=(math500 aime24 aime25)

# On one GPU. On several: launch=(accelerate launch --config_file ../configs/eight-gpus-fsdp2.yaml -m s2dcli)
launch=(s2d)
sampler=(--engine vllm --chat-template-kwargs '{"enable_thinking": false}')
sampling=(--max-tokens 16384)
samples=(-n 8)
many_samples=(-n 16) # for controls, which learn from the wrong ones or the right ones alone
grading=()
reward=() # math
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
curve_counts="64 256 1024 4096 16384"
