# The paper's second family for ../routes: Llama-3.1-8B-Instruct from Llama-3.3-70B-Instruct, measured on MATH-500. For hosts
# with several GPUs: launch starts eight processes, among which models are split. Whatever is not set here is as in ../qwen3.
# shellcheck shell=bash disable=SC2034,SC1091  # read by routes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../qwen3/settings.sh"
teacher=${TEACHER:-meta-llama/Llama-3.3-70B-Instruct}
student=${STUDENT:-meta-llama/Llama-3.1-8B-Instruct}
tests=(math500)
launch=(accelerate launch --config_file "$(dirname "${BASH_SOURCE[0]}")/../configs/eight-gpus-fsdp2.yaml" -m s2dcli)
sampler=(--engine vllm)
