#!/usr/bin/env bash
# Two hosts, as network namespaces of this one: they train over TCP; a process of one is killed; one is cut off.
#
#     sudo tests/bench/two_hosts.sh [FOLDER]
#
# Prints how far the weights are from those of one process, and after how many seconds, with which error, the
# other host ends. Each run is then resumed on one host. Needs root and iproute2. About five minutes.
set -euo pipefail

python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-$(mktemp -d)}
toy=$root/examples/toy
export PYTHONPATH=$root OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 GLOO_SOCKET_IFNAME=s2d-eth
options=(--problems-per-step 4 -n 4 --max-tokens 16 --lr 1e-4 --tokens-per-batch 64 --save-every 1 --save-dtype float32)

processes_of() { ip netns pids "s2d-$1" 2>/dev/null || true; }

clean_up() {
    for host in 0 1; do
        for pid in $(processes_of "$host"); do kill -9 "$pid" 2>/dev/null || true; done
        ip netns delete "s2d-$host" 2>/dev/null || true
    done
}
trap clean_up EXIT
clean_up

for host in 0 1; do
    ip netns add "s2d-$host"
    ip -n "s2d-$host" link set lo up
done
ip -n s2d-0 link add s2d-eth type veth peer name s2d-eth netns s2d-1
for host in 0 1; do
    ip -n "s2d-$host" address add "10.77.0.$((host + 1))/24" dev s2d-eth
    ip -n "s2d-$host" link set s2d-eth up
done

# start RUN STEPS: the same command on both hosts, in the background
start() {
    for host in 0 1; do
        ip netns exec "s2d-$host" "$python" -m accelerate.commands.accelerate_cli launch --use_fsdp --fsdp_version 2 \
            --num_machines 2 --num_processes 2 --machine_rank "$host" --main_process_ip 10.77.0.1 --main_process_port 29500 \
            -m s2dcli grpo --model "$toy/teacher" "$toy/problems/1H.jsonl" -o "$folder/$1" --steps "$2" "${options[@]}" \
            >"$folder/$1-host-$host.out" 2>"$folder/$1-host-$host.err" &
    done
}

# worker HOST: the process that trains there
worker() {
    for pid in $(processes_of "$1"); do
        if grep -qz "^RANK=$1\$" "/proc/$pid/environ" 2>/dev/null; then echo "$pid" && return; fi
    done
}

alone() { "$python" -m s2dcli grpo --model "$toy/teacher" "$toy/problems/1H.jsonl" "${options[@]}" "$@" -q; }

wait_for_step() {
    for _ in $(seq 600); do
        if [ -e "$folder/$1/step-000002" ]; then return; fi
        sleep 0.5
    done
    echo "$1: no second step after 300 s" >&2
    cat "$folder/$1"-host-*.err >&2
    exit 1
}

# tell RUN SECONDS: what the first host says, and the run's resumption by one process
tell() {
    local last
    last=$(sed 's/step-0*//' "$folder/$1/latest")
    printf '%-8s host 0 ended after %s s: %s\n' "$1" "$2" "$(grep -h '^error:' "$folder/$1-host-0.err" | tr '\n' ' ')"
    printf '%-8s resumed by one process: ' "$1"
    alone -o "$folder/$1" --steps "$((last + 1))" --resume | "$python" -c 'import json, sys; print("step", json.load(sys.stdin)["step"])'
}

start trained 2
wait
alone -o "$folder/alone" --steps 2 >/dev/null
"$python" - "$folder" <<'EOF'
import sys
from pathlib import Path

from safetensors.torch import load_file

one, two = (load_file(Path(sys.argv[1]) / run / "step-000002" / "model.safetensors") for run in ("alone", "trained"))
apart = (sum((one[name] - two[name]).square().sum() for name in one) / sum(value.square().sum() for value in one.values())).sqrt()
print(f"trained  two hosts, FSDP2 over TCP: weights {float(apart):.1e} from those of one process")
EOF

start killed 500
wait_for_step killed
began=$(date +%s)
waited=$(worker 0)
kill -9 "$(worker 1)"
while kill -0 "$waited" 2>/dev/null; do sleep 0.2; done
tell killed "$(($(date +%s) - began))"
for host in 0 1; do for pid in $(processes_of "$host"); do kill -9 "$pid" 2>/dev/null || true; done; done
wait || true

start "cut off" 500
wait_for_step "cut off"
began=$(date +%s)
waited=$(worker 0)
ip -n s2d-1 link set s2d-eth down
while kill -0 "$waited" 2>/dev/null; do sleep 0.2; done
tell "cut off" "$(($(date +%s) - began))"
for host in 0 1; do for pid in $(processes_of "$host"); do kill -9 "$pid" 2>/dev/null || true; done; done
wait || true
