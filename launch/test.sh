#!/usr/bin/env bash
# Run the tests: bash launch/test.sh [--fast | --all] [-- pytest options]
#   (default)  everything but the tests for a scheduler (cluster) and for GPUs and the thorough ones: side by side in
#              WORKERS processes (default 2), then those that start many processes one after another
#   --fast     the quick ones only
#   --all      everything; what this machine cannot run is skipped with its reason
never="not cluster and not gpu and not thorough"
together="($never) and not alone" alone="($never) and alone"
case "${1:-}" in
    --fast) together="not slow and $never" alone=""; shift ;;
    --all) together="not alone" alone="alone"; shift ;;
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
unset PYTHONDONTWRITEBYTECODE  # each of some hundred processes would compile the package anew, and pytest the tests

worst=0 empty=0
run() {
    local code=0
    python -m pytest "$@" || code=$?
    if [ "$code" = 5 ]; then empty=$((empty + 1)); elif [ "$code" -gt "$worst" ]; then worst="$code"; fi
}
run -n "${WORKERS:-2}" --dist loadfile -m "$together" "$@"
parts=1
if [ -n "$alone" ]; then
    run -m "$alone" "$@"
    parts=2
fi
if [ "$empty" = "$parts" ]; then worst=5; fi  # pytest's code for: no test ran
exit "$worst"
