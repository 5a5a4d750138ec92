#!/usr/bin/env bash
# Train one ResNet-18 on CIFAR-10 from scratch and attack it with AutoAttack: bash benchmarks/record.sh [key=value ...]
#   key=value   settings of the training, e.g. data.name=npz data.root=cifar10.npz; run.device=cpu tries the script
#   PYTHON      a Python with what the package needs (default: python3)
#   RUN         folder of the run (default: runs/record); an interrupted record goes on where it was
#   IMAGES      test images that AutoAttack meets (default 1000)
# What is written: RUN, and benchmarks/results/<device>/record.json with seconds, accuracies, commit and settings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
python="${PYTHON:-python3}" run="${RUN:-runs/record}" images="${IMAGES:-1000}"

"$python" -m mat_dist.train --config cifar10_record run.root="$(dirname "$run")" run.name="$(basename "$run")" "$@"
"$python" -m mat_dist.evaluate "$run" attacks=autoattack targets=peers images="$images"
"$python" -m benchmarks.record "$run"
