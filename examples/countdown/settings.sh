# The countdown family on a CPU, for ../routes, with a verifier of its own. Whatever is not set here is as in ../toy.
# shellcheck shell=bash disable=SC2034,SC2154,SC1091  # read by routes/common.sh
TOY=${COUNTDOWN:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)} # another family: COUNTDOWN=FOLDER of pretrain.py
source "$(dirname "${BASH_SOURCE[0]}")/../toy/settings.sh"
PYTHONPATH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)${PYTHONPATH:+:$PYTHONPATH} # the module countdown
export PYTHONPATH
reward=(--reward python:countdown:verify)
sampling=(--max-tokens 42)
eval_sampled=(-k 4 --max-tokens 42)
eval_greedy=(--temperature 0 --max-tokens 42)
