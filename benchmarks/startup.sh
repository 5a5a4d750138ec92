#!/usr/bin/env bash
# How long until training starts: bash benchmarks/startup.sh
# Seconds of `python -m mat_dist.train --help`, and until 4 ranks have logged their first step on the embedded digits.
#   PYTHON   default python3;   ROUNDS   default 5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
python="${PYTHON:-python3}"
runs="$(mktemp -d)"
trap 'rm -rf "$runs"' EXIT
for round in $(seq "${ROUNDS:-5}"); do
    start="$EPOCHREALTIME"
    "$python" -m mat_dist.train --help > /dev/null
    echo "$start $EPOCHREALTIME" >> "$runs/help"
    start="$EPOCHREALTIME"
    "$python" -m torch.distributed.run --standalone --nproc_per_node=4 -m mat_dist.train run.root="$runs" \
        run.name="$round" train.max_steps=1 log.every=1 log.console=off eval.every=0 eval.test_steps=0 > /dev/null
    echo "$start $(stat -c %.6Y "$runs/$round/metrics.jsonl")" >> "$runs/first_step"
done
for what in help first_step; do
    awk '{ print $2 - $1 }' "$runs/$what" | sort -n | awk -v what="$what" \
        '{ t[NR] = $1 } END { printf "%s: median %.2f s (%.2f to %.2f), %d rounds\n", what, t[int((NR + 1) / 2)], t[1], t[NR], NR }'
done
