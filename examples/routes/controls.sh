#!/usr/bin/env bash
# The controls that are no routes of the paper, one after the other, and their table:  controls.sh SETTINGS OUT [SEED]
#
# With the OUT of all.sh they share what is there, and claims.py OUT sets them against its routes.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
for control in wrong-rollouts negative-advantage self-distillation; do
    "$here/$control.sh" "$@"
done
echo
s2d report "$2/seed-${3:-0}"/eval/*
