#!/usr/bin/env bash
# Run the tests: bash launch/test.sh [--fast | --all] [-- pytest options]
#   (default)  everything but the tests for a scheduler (cluster) and for GPUs
#   --fast     also without the slow ones
#   --all      everything; what this machine cannot run is skipped with its reason
select="not cluster and not gpu"
case "${1:-}" in
    --fast) select="not slow and not cluster and not gpu"; shift ;;
    --all) select=""; shift ;;
esac
if [ "${1:-}" = "--" ]; then
    shift
elif [ $# -gt 0 ]; then
    echo "mat_dist: error: unknown option '$1' (launch/test.sh): use --fast or --all, and pytest's options after --" >&2
    exit 2
fi
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

OMP_NUM_THREADS=1 exec python -m pytest -m "$select" "$@"
