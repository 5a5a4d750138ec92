#!/usr/bin/env bash
# Does bf16 cost robust accuracy? bash benchmarks/precision.sh [key=value ...]
# Trains Fashion-MNIST in fp32 and in bf16 with three seeds, attacks all 10,000 test images with PGD-20 in fp32, and
# compares image by image. Interrupted, it goes on where it was. Needs data.root=FOLDER (four gzipped idx files).
#   PYTHON   default python3;   ROOT   folder of the runs, default runs/precision
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
root="${ROOT:-runs/precision}"
for seed in 0 1 2; do
    for precision in fp32 bf16; do
        run="${precision}_$seed"
        if grep -qs '"code": 0' "$root/$run/exit.json"; then continue; fi
        "${PYTHON:-python3}" -m mat_dist.train --config fashion_mnist run.root="$root" run.name="$run" run.seed="$seed" \
            peers=2 step.precision="$precision" train.epochs=1 train.batch_size=64 data.train_size=6400 data.val_size=500 \
            data.test_size=10000 eval.every=0 eval.test=true optim.ema_decay=null log.console=plain "$@"
    done
done
"${PYTHON:-python3}" -m benchmarks.paired "$root"/fp32_? -- "$root"/bf16_?
