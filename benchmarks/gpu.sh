#!/usr/bin/env bash
# Everything that needs a GPU, within 9 minutes and without a network: bash benchmarks/gpu.sh [key=value ...]
# Tests marked gpu, then `benchmarks.speed engines`, `naive` and `step` for ResNet-18 on 32 x 32, then one table.
#   key=value   settings for every benchmark, e.g. train.batch_size=256; run.device=cpu tries the script without a GPU
#   PYTHON      a Python with what the package needs, and pytest (default: python3)
#   OUT         folder for the JSON files (default: benchmarks/results/<device>)
#   ROUNDS      timed rounds (default 15)
#   BUDGET      seconds after which no further benchmark is started (default 500)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
python="${PYTHON:-python3}" rounds="${ROUNDS:-15}" budget="${BUDGET:-500}" settings=("$@") failed=0
needs="torch torchvision numpy rich filelock safetensors pydantic jinja2 matplotlib scipy ruamel.yaml pytest"

case " $* " in
    *" run.device=cpu "*) device=cpu ;;
    *)
        if ! lacks="$("$python" -c "import ${needs// /, }" 2>&1)"; then
            echo "mat_dist: error: $python: ${lacks##*$'\n'} (PYTHON): set PYTHON to a Python that has $needs" >&2
            exit 6
        fi
        device="$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')"
        if [ -z "$device" ]; then
            echo "mat_dist: error: no GPU is visible (torch.cuda.is_available): check the driver and" \
                "CUDA_VISIBLE_DEVICES, or try the script with run.device=cpu" >&2
            exit 6
        fi ;;
esac
out="${OUT:-benchmarks/results/$(echo "$device" | tr -c 'A-Za-z0-9\n' _)}"
mkdir -p "$out"

# measure NAME COMMAND [torchrun] SETTINGS...: one benchmark; a failure is told and the others still run
measure() {
    local name="$1" command="$2" start=("$python" -m) code=0
    shift 2
    if [ "${1:-}" = torchrun ]; then
        shift
        start=("$python" -m torch.distributed.run --standalone --nproc_per_node=2 -m)
    fi
    if [ "$SECONDS" -gt "$budget" ]; then
        echo "mat_dist: $name left out: ${SECONDS} s are over (BUDGET=$budget)" >&2
        failed=1
        return
    fi
    timeout --signal=TERM --kill-after=20 120 "${start[@]}" benchmarks.speed "$command" --config bench_resnet18 \
        --rounds "$rounds" --json "$out/$name.json" train.batch_size=128 "$@" "${settings[@]}" || code=$?
    if [ "$code" != 0 ]; then
        echo "mat_dist: $name ended with $code" >&2
        failed=1
    fi
}

at=(peers=1 loss=at step.precision=bf16)
mutual=(loss=mat step.precision=bf16)
# What decides most comes first; "$budget" ends the list.
"$python" -m pytest -q -p no:cacheprovider -m gpu tests || { code=$?; [ "$code" = 5 ] || failed=1; }
measure at_1_engines engines "${at[@]}"
measure mat_2_engines engines "${mutual[@]}" peers=2
measure at_1_naive naive "${at[@]}" step.engine=compile
measure mat_2_naive naive "${mutual[@]}" peers=2 step.engine=compile
measure at_1_graph step "${at[@]}" step.engine=graph
measure mat_2_ranks step torchrun "${mutual[@]}" peers=2 comm.backend=gloo
measure at_1_batch_512 engines "${at[@]}" train.batch_size=512
measure mat_4_graph step "${mutual[@]}" peers=4 step.engine=graph
measure mat_4_recompute step "${mutual[@]}" peers=4 step.memory=recompute step.engine=graph
measure mat_2_naive_fp32 naive loss=mat peers=2 step.engine=graph
"$python" -m benchmarks.speed summary "$out"
exit "$failed"
