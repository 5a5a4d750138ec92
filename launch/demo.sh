#!/usr/bin/env bash
# Train four peers on the embedded digits, one rank each: bash launch/demo.sh [--config FILE] [key=value ...]
# NPROC=1, 2 or 4 ranks give the same weights on the CPU.
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

root=runs name="demo-$(date -u +%Y%m%dT%H%M%SZ)"
for argument in "$@"; do
    case "$argument" in
        run.root=*) root="${argument#*=}" ;;
        run.name=*) name="${argument#*=}" ;;
    esac
done

echo "mat_dist: training on ${NPROC:-4} ranks, run folder $root/$name"
code=0
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" torchrun --standalone --nproc_per_node="${NPROC:-4}" --local-ranks-filter=0 \
    -m mat_dist.train "$@" run.root="$root" run.name="$name" || code=$?
if [ -d "$root/$name" ]; then echo "mat_dist: run folder $root/$name"; fi
if [ "$code" -ne 0 ]; then
    echo "mat_dist: failed; the reason is the line 'mat_dist: error: ...' above torchrun's own report" >&2
fi
exit "$code"
