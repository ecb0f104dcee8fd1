#!/usr/bin/env bash
# Does `s2d probe` say beforehand which route works? Its verdict on pairs of the toy family, beside what the routes bring.
#
#     examples/toy/probe_pairs.sh [QUICKSTART] [FOLDER] [short]      runs/quickstart runs/probe-pairs
#
# QUICKSTART is the folder of a finished examples/quickstart.sh, whose checkpoints are probed on the 200 validation problems.
# From each pair on the routes are then tried: on-policy distillation (60 steps), the bridge (150 steps of forward-KL warm-up
# before it), GRPO of the student (80 steps), each measured on the test problems, avg@4 at temperature 1. Routes that the
# quick start has measured are taken from there. `short` takes a few steps and problems of everything, to see that it runs.
set -euo pipefail

quickstart=${1:-runs/quickstart}
out=${2:-runs/probe-pairs}
case ${3:-full} in
    full)  warmup_steps=150 opd_steps=60 grpo_steps=80 num_problems=200 ;;
    short) warmup_steps=2   opd_steps=2  grpo_steps=2   num_problems=16 ;;
    *)     echo "usage: $0 [QUICKSTART] [FOLDER] [short]" >&2; exit 2 ;;
esac
if [ ! -e "$quickstart/eval/rl-bridge-sampled/results.json" ]; then
    echo "$0: $quickstart is no finished quick start; examples/quickstart.sh $quickstart makes one" >&2
    exit 2
fi
if [ -e "$out" ]; then
    echo "$0: $out exists; remove it or name another folder" >&2
    exit 2
fi

toy=$(cd "$(dirname "$0")" && pwd)
labelled=$toy/problems/1H.jsonl
mkdir -p "$out"
head -n "$num_problems" "$toy/problems/validation.jsonl" > "$out/held-out.jsonl"
export OMP_NUM_THREADS=1  # the models are tiny: more threads would only wait for each other
sampling=(--max-tokens 16)
distil=(--schedule cosine --min-lr-ratio 0.1 --warmup-steps 10 --adam-beta2 0.95)

# pair NAME TEACHER STUDENT BASE ROUTES: probe a pair (no C1 if BASE is empty), then try routes.
pair() {
    local here=$out/$1 teacher=$2 student=$3 route
    s2d probe -q --teacher "$teacher" --student "$student" ${4:+--base-teacher "$4"} "$out/held-out.jsonl" "${sampling[@]}" --workers 1 \
        -o "$here/probe" > /dev/null
    for route in $5; do
        "$route" "$here" "$teacher" "$student"
        s2d eval -q -m "$here/$route" "$quickstart/test.jsonl" -k 4 "${sampling[@]}" --workers 1 > "$here/$route.json"
    done
    printf '%5d s  %s\n' "$SECONDS" "$1" >&2
}

opd() {
    s2d opd -q --teacher "$2" --student "$3" "$labelled" --lr 1e-3 --steps "$opd_steps" --problems-per-step 128 -n 1 \
        "${sampling[@]}" "${distil[@]}" -o "$1/${4:-opd}" > /dev/null
}

bridge() {
    s2d rollout -q -m "$2" "$labelled" -n 2 "${sampling[@]}" -o "$1/rollouts.jsonl"
    s2d fkl-warmup -q --teacher "$2" --student "$3" --rollouts "$1/rollouts.jsonl" --lr 2e-3 --steps "$warmup_steps" \
        --mini-batch-size 128 "${distil[@]}" -o "$1/warmup" > /dev/null
    opd "$1" "$2" "$1/warmup" bridge
}

grpo() {
    s2d grpo -q -m "$3" "$labelled" --lr 1e-4 --steps "$grpo_steps" --problems-per-step 32 -n 8 --warmup-steps 5 \
        --adam-beta2 0.95 "${sampling[@]}" --workers 1 -o "$1/grpo" > /dev/null
}

# known PAIR ROUTE NAME: a route of a pair is one that the quick start has measured.
known() {
    mkdir -p "$out/$1"
    cp "$quickstart/eval/$3-sampled/results.json" "$out/$1/$2.json"
}

raw=$toy/teacher rl=$quickstart/rl-teacher
known "raw teacher, student at the start" bridge raw-bridge
known "raw teacher, student at the start" grpo direct
known "RL teacher, student at the start" bridge rl-bridge
known "RL teacher, student at the start" grpo direct
known "RL teacher, student warmed up" opd rl-bridge
known "raw teacher, student warmed up on it" opd raw-bridge

pair "raw teacher, student at the start" "$raw" "$toy/student" "" opd
pair "RL teacher, student at the start" "$rl" "$toy/student" "$raw" opd
pair "RL teacher, student warmed up" "$rl" "$quickstart/rl-bridge/warmup" "$raw" grpo
pair "raw teacher, student warmed up on it" "$raw" "$quickstart/raw-bridge/warmup" "" grpo
pair "RL teacher, student after GRPO" "$rl" "$quickstart/direct" "$raw" "opd bridge grpo"
mkdir -p "$out/raw teacher, student after GRPO"
cp "$out/RL teacher, student after GRPO/grpo.json" "$out/raw teacher, student after GRPO"  # the same student
pair "raw teacher, student after GRPO" "$raw" "$quickstart/direct" "" "opd bridge"
pair "RL teacher, student after the bridge" "$rl" "$quickstart/rl-bridge/opd" "$raw" "opd grpo"

python - "$out" "$quickstart" <<'PYTHON'
import json
import sys
from pathlib import Path

out, quickstart = map(Path, sys.argv[1:])


def percent(path):
    if not path.exists():
        return "-"
    found = json.loads(path.read_text())
    return f"{100 * found['avg_at_k']:.1f} ± {100 * found['se']:.1f}"


print("| pair | teacher | student | KL | AUC (C1) | verdict | OPD | bridge | GRPO | RL of the teacher, bridge |")
print("|---|---:|---:|---:|---:|---|---:|---:|---:|---:|")
for folder in sorted(path.parent for path in out.glob("*/probe")):
    probe = json.loads((folder / "probe/results.json").read_text())
    verdict = probe["verdict"]["route"] + ("" if probe["verdict"]["resolved"] else " (not resolved)")
    accuracies = [f"{100 * probe[role]['avg_at_k']:.1f} ± {100 * probe[role]['se']:.1f}" for role in ("teacher", "student")]
    auc = f"{probe['c1']['within_groups']['value']:.2f}" if probe["c1"] else "-"
    kl = f"{probe['c2']['kl']['value']:.3f} ± {probe['c2']['kl']['se']:.3f}"
    routes = [percent(folder / f"{name}.json") for name in ("opd", "bridge", "grpo")]
    last = percent(quickstart / "eval/rl-bridge-sampled/results.json") if folder.name.startswith("raw") else "-"
    print("|", " | ".join([folder.name, *accuracies, kl, auc, verdict, *routes, last]), "|")
PYTHON
