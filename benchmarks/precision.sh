#!/usr/bin/env bash
# Does bf16 cost robust accuracy? bash benchmarks/precision.sh [options] [key=value ...]
# Trains Fashion-MNIST in fp32 and in bf16 with three seeds, attacks all 10,000 test images with PGD-20 in fp32, and
# compares image by image, by benchmarks/precision.yaml. Interrupted, it goes on where it was. Needs data.root=FOLDER
# (four gzipped idx files). Options are those of `python -m benchmarks.study evidence`, such as --jobs 2, --dry-run.
#   PYTHON   default python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.study evidence --file benchmarks/precision.yaml --suite precision \
    --root runs/precision "$@"
