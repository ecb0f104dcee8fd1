#!/usr/bin/env bash
# Does `s2d probe` say beforehand which route works? Its verdict on pairs of the toy family, beside what the routes bring.
#
#     examples/toy/probe_pairs.sh [QUICKSTART] [FOLDER] [short]      runs/quickstart runs/probe-pairs
#
# QUICKSTART is the folder of a finished examples/quickstart.sh, whose checkpoints are probed on the 200 validation problems.
# For each pair the student is then distilled on-policy, warmed up and distilled, and trained by GRPO (as many steps as
# the quick start takes, a new stage each), and measured on the test problems, avg@4 at temperature 1. What the quick start
# has measured is taken from there. `short` takes a few steps and problems of everything, to see that it runs.
set -euo pipefail

quickstart=${1:-runs/quickstart}
out=${2:-runs/probe-pairs}
case ${3:-full} in
    full)  warmup_steps=150 opd_steps=60 grpo_steps=200 num_problems=200 ;;
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

# pair NAME TEACHER STUDENT [BASE]: probe a pair, and try every route from there that the quick start has not tried.
pair() {
    local here=$out/$1 teacher=$2 student=$3
    s2d probe -q --teacher "$teacher" --student "$student" ${4:+--base-teacher "$4"} "$out/held-out.jsonl" "${sampling[@]}" --workers 1 \
        -o "$here/probe" > /dev/null
    if [ ! -e "$here/opd.json" ]; then
        s2d opd -q --teacher "$teacher" --student "$student" "$labelled" --lr 1e-3 --steps "$opd_steps" --problems-per-step 128 -n 1 \
            "${sampling[@]}" "${distil[@]}" -o "$here/opd" > /dev/null
        measure "$here/opd" "$here/opd.json"
    fi
    if [ ! -e "$here/bridge.json" ]; then
        s2d rollout -q -m "$teacher" "$labelled" -n 2 "${sampling[@]}" -o "$here/rollouts.jsonl"
        s2d fkl-warmup -q --teacher "$teacher" --student "$student" --rollouts "$here/rollouts.jsonl" --lr 2e-3 --steps "$warmup_steps" \
            --mini-batch-size 128 "${distil[@]}" -o "$here/warmup" > /dev/null
        s2d opd -q --teacher "$teacher" --student "$here/warmup" "$labelled" --lr 1e-3 --steps "$opd_steps" --problems-per-step 128 -n 1 \
            "${sampling[@]}" "${distil[@]}" -o "$here/bridge" > /dev/null
        measure "$here/bridge" "$here/bridge.json"
    fi
    if [ ! -e "$here/grpo.json" ]; then
        s2d grpo -q -m "$student" "$labelled" --lr 1e-4 --steps "$grpo_steps" --problems-per-step 32 -n 8 --warmup-steps 5 \
            --adam-beta2 0.95 "${sampling[@]}" --workers 1 -o "$here/grpo" > /dev/null
        measure "$here/grpo" "$here/grpo.json"
    fi
    printf '%5d s  %s\n' "$SECONDS" "$1" >&2
}

measure() {
    s2d eval -q -m "$1" "$quickstart/test.jsonl" -k 4 "${sampling[@]}" --workers 1 > "$2"
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

pair "raw teacher, student at the start" "$raw" "$toy/student"
pair "RL teacher, student at the start" "$rl" "$toy/student" "$raw"
pair "RL teacher, student warmed up" "$rl" "$quickstart/rl-bridge/warmup" "$raw"
pair "raw teacher, student warmed up on it" "$raw" "$quickstart/raw-bridge/warmup"
pair "RL teacher, student after GRPO" "$rl" "$quickstart/direct" "$raw"
pair "raw teacher, student after GRPO" "$raw" "$quickstart/direct"
pair "RL teacher, student after the bridge" "$rl" "$quickstart/rl-bridge/opd" "$raw"

python - "$out" "$quickstart" <<'PYTHON'
import json
import sys
from pathlib import Path

out, quickstart = map(Path, sys.argv[1:])
bridge = json.loads((quickstart / "eval/rl-bridge-sampled/results.json").read_text())


def percent(found):
    return f"{100 * found['avg_at_k']:.1f} ± {100 * found['se']:.1f}"


print("| pair | teacher | student | KL | AUC (C1) | verdict | OPD | bridge | GRPO | RL of the teacher, bridge |")
print("|---|---:|---:|---:|---:|---|---:|---:|---:|---:|")
for folder in sorted(path.parent for path in out.glob("*/probe")):
    probe = json.loads((folder / "probe/results.json").read_text())
    routes = [percent(json.loads((folder / f"{name}.json").read_text())) for name in ("opd", "bridge", "grpo")]
    verdict = probe["verdict"]["route"] + ("" if probe["verdict"]["resolved"] else " (not resolved)")
    auc = f"{probe['c1']['within_groups']['value']:.2f}" if probe["c1"] else "-"
    kl = f"{probe['c2']['kl']['value']:.3f} ± {probe['c2']['kl']['se']:.3f}"
    last = percent(bridge) if folder.name.startswith("raw") else "-"
    print("|", " | ".join([folder.name, *(percent(probe[role]) for role in ("teacher", "student")), kl, auc, verdict, *routes, last]), "|")
PYTHON
