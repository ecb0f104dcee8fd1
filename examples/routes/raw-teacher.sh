#!/usr/bin/env bash
# Raw teacher: no label at all; the bridge from the teacher as it is.
source "$(dirname "$0")/common.sh"

evaluate teacher "$teacher" "teacher at the start"
evaluate student "$student" "student at the start"
bridge raw "$teacher" "$both"
evaluate raw "$out/raw" "bridge from the raw teacher"
