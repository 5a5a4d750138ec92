#!/usr/bin/env bash
# Some minutes of a suite on a machine that is lent for minutes: bash benchmarks/slice.sh SUITE STATE OUT [key=value ...]
# Takes up the state that an earlier slice left in the folder STATE (-: the first slice), trains and attacks what is missing
# for BUDGET seconds, and leaves page, numbers and the new state in the folder OUT: at most 64 MiB, no file above 16. Says
# what is left; code 75 where that is something, 0 where the suite is done. docs/studies.md has the limits and examples.
#   key=value   settings for every run, e.g. data.root=cifar10.npz; options of `python -m benchmarks.study slices` too
#   BUDGET      seconds after which what runs is saved and stopped (default 500)
#   PYTHON      default python3
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "mat_dist: error: SUITE, STATE and OUT are needed (command line): bash benchmarks/slice.sh gpu_overfit - out" \
        "data.root=cifar10.npz" >&2
    exit 2
fi
suite="$1" state="$2" out="$3" here="$(dirname "${BASH_SOURCE[0]}")/.."
shift 3
export PYTHONPATH="$(cd "$here" && pwd)${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.study slices --suite "$suite" --state "$state" --out "$out" \
    --budget "${BUDGET:-500}" "$@"
