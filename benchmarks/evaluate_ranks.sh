#!/usr/bin/env bash
# How much faster is an evaluation on two ranks? bash benchmarks/evaluate_ranks.sh RUN [key=value ...]
# Takes turns: one process, two ranks, one process, ... with one thread per rank on both sides and a seed of its own per
# round. Prints the wall seconds, start of Python included, the medians and their ratio; fails unless both tables of
# each round are identical. Works on copies of RUN.
#   PYTHON   default python3;   ROUNDS   default 3
set -euo pipefail
run="$(realpath "${1:?usage: bash benchmarks/evaluate_ranks.sh RUN [key=value ...]}")"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

evaluate() {  # ranks, seed, further words; sets `seconds`, leaves the table in $work/<ranks>.csv
    local ranks=$1 seed=$2 launcher=() began ended
    shift 2
    rm -rf "$work/run"
    cp -r "$run" "$work/run"
    rm -rf "$work/run"/eval/evaluate_*
    if ((ranks > 1)); then launcher=(-m torch.distributed.run --standalone "--nproc_per_node=$ranks"); fi
    began=$(date +%s.%N)
    # A failed soundness check ends with a code too, and with a table.
    "$python" "${launcher[@]}" -m mat_dist.evaluate "$work/run" run.device=cpu run.threads=1 "$@" seed="$seed" \
        >"$work/log" 2>&1 || true
    ended=$(date +%s.%N)
    mv "$work/run"/eval/evaluate_*.csv "$work/$ranks.csv" || { cat "$work/log" >&2; return 1; }
    seconds="$("$python" -c "print(f'{$ended - $began:.2f}')")"
}

one=() two=()
for ((round = 1; round <= ${ROUNDS:-3}; round++)); do
    evaluate 1 "$round" "$@"
    one+=("$seconds")
    evaluate 2 "$round" "$@"
    two+=("$seconds")
    cmp "$work/1.csv" "$work/2.csv"
    echo "round $round: 1 rank ${one[-1]} s, 2 ranks ${two[-1]} s, $(wc -l <"$work/1.csv") equal lines"
done
"$python" - "${one[*]}" "${two[*]}" <<'END'
import statistics
import sys

one, two = (statistics.median(map(float, times.split())) for times in sys.argv[1:])
print(f"median: 1 rank {one:.2f} s, 2 ranks {two:.2f} s, {one / two:.2f} times faster")
END
