#!/usr/bin/env bash
# Run every line of standard input as a command, as many side by side as there are cores; it fails if one of them does.
set -euo pipefail

cores=$(env --unset=OMP_NUM_THREADS nproc) # nproc counts that variable's threads, of which each command has one, and not cores
tr '\n' '\0' | xargs -0 -n 1 -P "$cores" bash -c
