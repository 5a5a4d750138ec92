#!/usr/bin/env bash
# Run the tests: bash launch/test.sh [--fast | --all] [-- pytest options]
#   (default)  everything but the tests for a scheduler (cluster) and for GPUs and the thorough ones: side by side in
#              WORKERS processes (default 2), but those that start many processes one after another
#   --fast     the quick ones only
#   --all      everything; what this machine cannot run is skipped with its reason
never="not cluster and not gpu and not thorough"
quick="not slow and $never" rest="slow and $never"
case "${1:-}" in
    --fast) rest=""; shift ;;
    --all) rest="slow or cluster or gpu or thorough"; shift ;;
esac
if [ "${1:-}" = "--" ]; then
    shift
elif [ $# -gt 0 ]; then
    echo "mat_dist: error: unknown option '$1' (launch/test.sh): use --fast or --all, and pytest's options after --" >&2
    exit 2
fi
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export OMP_NUM_THREADS=1

worst=0 empty=0
run() {
    local code=0
    python -m pytest "$@" || code=$?
    if [ "$code" = 5 ]; then empty=$((empty + 1)); elif [ "$code" -gt "$worst" ]; then worst="$code"; fi
}
run -n "${WORKERS:-2}" --dist loadfile -m "$quick" "$@"
parts=1
if [ -n "$rest" ]; then
    run -n "${WORKERS:-2}" --dist loadfile -m "($rest) and not alone" "$@"
    run -m "($rest) and alone" "$@"
    parts=3
fi
if [ "$empty" = "$parts" ]; then worst=5; fi  # pytest's code for: no test ran
exit "$worst"
