#!/usr/bin/env bash
# The learning rate and number of steps of cold GRPO (route R1), chosen on validation problems:
#
#     examples/toy/tune.sh [FOLDER] [RATES] [STEPS]      runs/tune "1e-4 2e-4 4e-4 8e-4 1.6e-3" 400
#
# The table has the student's avg@4 at temperature 1 on the 200 validation problems after every 100 steps on all 1,024 labels.
# shellcheck disable=SC1091,SC2154  # settings.sh sets models, problems and options
set -euo pipefail

out=${1:-runs/tune}
rates=${2:-1e-4 2e-4 4e-4 8e-4 1.6e-3}
steps=${3:-400}
source "$(dirname "$0")/settings.sh"

for rate in $rates; do
    echo "s2d grpo --model '$student' '$both' ${sampling[*]} ${grading[*]} ${trainer[*]} ${grpo[*]} --steps $steps --lr $rate \
        --eval-problems '$toy/problems/validation.jsonl' --eval-every 100 --eval-samples 4 --resume -o '$out/lr-$rate' > '$out/lr-$rate.log' 2>&1"
done | "$(dirname "$0")/../routes/side_by_side.sh"

python - "$out" "$rates" <<'PYTHON'
import json
import sys
from pathlib import Path

table = {}
for rate in sys.argv[2].split():
    rows = map(json.loads, (Path(sys.argv[1]) / f"lr-{rate}" / "evals.jsonl").read_text().splitlines())
    table[rate] = {row["step"]: row["avg_at_k"] for row in rows}
steps = sorted({step for row in table.values() for step in row})
print(f"| lr | {' | '.join(f'{step} steps' for step in steps)} |\n|---:|{'---:|' * len(steps)}")
for rate, row in table.items():
    print(f"| {rate} | {' | '.join(f'{100 * row[step]:.1f}' if step in row else '-' for step in steps)} |")
PYTHON
