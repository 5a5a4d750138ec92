#!/usr/bin/env bash
# Train 20 steps on 1, 2 and 4 ranks and print the hashes of all weights: they are equal.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export OMP_NUM_THREADS=1
root=${RUN_ROOT:-runs}/placement-$(date -u +%Y%m%dT%H%M%SZ)
for ranks in 1 2 4; do
  torchrun --standalone --nproc_per_node="$ranks" --local-ranks-filter=0 -m mat_dist.train run.root="$root" run.name="ranks-$ranks" \
    train.max_steps=20 eval.every=0 eval.test_steps=0 log.console=off "$@"
done
python -m mat_dist.hashes "$root"/ranks-1 "$root"/ranks-2 "$root"/ranks-4
