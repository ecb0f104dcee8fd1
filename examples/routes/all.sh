#!/usr/bin/env bash
# All routes, in two lanes side by side, their table, and their page:  all.sh SETTINGS OUT [SEED] [one]
#
# Routes of one lane share what is costly: the RL teacher of 1H, or the RL student. `one` runs them one after the other, where there is one GPU.
# Run it again after an interruption and it goes on where it was.
set -euo pipefail

if [ $# -lt 2 ] || [ $# -gt 4 ]; then
    echo "usage: $0 SETTINGS OUT [SEED] [one]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
settings=$1 out=$2 seed=${3:-0}

lane() {
    local route
    for route; do
        "$here/$route.sh" "$settings" "$out" "$seed"
    done
}

first=(r5-half r7-replay r2-teacher-sft r8-opd-only)
second=(r1-cold-grpo same-size r3-full r6-sft-teacher raw-teacher)
if [ "${4:-}" = one ]; then
    lane "${first[@]}" "${second[@]}"
else
    set -m # each lane a process group of its own, so that neither outlives the script
    lane "${first[@]}" &
    lanes=($!)
    lane "${second[@]}" &
    lanes+=($!)
    trap 'kill -- "${lanes[@]/#/-}" 2> /dev/null || true' EXIT
    for _ in "${lanes[@]}"; do
        wait -n || exit 1 # the first to fail stops the other
    done
fi
echo
s2d report "$out/seed-$seed"/eval/* --html "$out/seed-$seed/report.html" --page-size 4MB --overwrite
