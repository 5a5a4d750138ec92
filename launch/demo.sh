#!/usr/bin/env bash
# Train four peers on the embedded digits, one rank each: bash launch/demo.sh [--config FILE] [key=value ...]
# NPROC: ranks; default 4, or as many of 1, 2, 4 as there are GPUs. On the CPU they give the same weights.
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
case "$gpus" in 1) fitting=1 ;; 2|3) fitting=2 ;; *) fitting=4 ;; esac
ranks="${NPROC:-$fitting}"

root=runs name="demo-$(date -u +%Y%m%dT%H%M%SZ)"
for argument in "$@"; do
    case "$argument" in
        run.root=*) root="${argument#*=}" ;;
        run.name=*) name="${argument#*=}" ;;
    esac
done

echo "mat_dist: training on $ranks ranks, run folder $root/$name"
code=0
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" torchrun --standalone --nproc_per_node="$ranks" --local-ranks-filter=0 \
    -m mat_dist.train "$@" run.root="$root" run.name="$name" || code=$?
if [ -d "$root/$name" ]; then echo "mat_dist: run folder $root/$name"; fi
exit "$code"
