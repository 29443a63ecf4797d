#!/usr/bin/env bash
# Runs the checks that need a CUDA GPU with TensorRT 10 and writes their results to tests/gpu-results.md (or $RESULTS).
#
# usage: TRTVLM_TENSORRT=DIR tests/gpu.sh [small] [schemes] [sanitize] [real] [shapes] [calibrate] [memory]        without arguments the first five
#   small     engines of tiny and small models against the reference; refusals; a killed build
#   schemes   every quantization scheme in every family, and other tools' quantized checkpoints
#   sanitize  compute-sanitizer's memcheck and racecheck over every kernel, on engines that `small` left
#   real      LLaVA-1.5-7B's shape with random weights (64 GB of disk): build, speed, Hugging Face transformers beside it
#   shapes    the other families' real shapes: build, speed
#   memory    LLaVA-1.5-7B's and 13B's shapes built for 1, 2 and 8 ranks: seconds and memory (64 GB of disk)
#   calibrate calibration on the GPU against that on the CPU, and LLaVA-1.5-7B's shape: seconds and memory
# TRTVLM          the program; built with cargo where it is not given
# TRTVLM_SMOLLM2  SmolLM2-135M as a Hugging Face checkpoint (`make eval-text` makes one); left out with a word if missing
# TRTVLM_TRAINED_LLAVA, TRTVLM_PICTURE  a LLaVA that reads pictures, and one; likewise
# TRTVLM_PEERS    a folder of checkpoints that other tools quantized; likewise
# WORK            where engines are put, kept between calls
set -uo pipefail
cd "$(dirname "$0")/.."
: "${TRTVLM_TENSORRT:?names the folder of libnvinfer.so.10}"
# For cuBLASLt, whose product is the arithmetic limit that `bench` states.
export LD_LIBRARY_PATH="/usr/local/cuda/lib64:${LD_LIBRARY_PATH:-}"
WORK=${WORK:-/tmp/trtvlm-gpu}
if [ -z "${TRTVLM:-}" ]; then
  cargo build --release --locked || exit 3
  TRTVLM=target/release/trtvlm
fi
export TRTVLM
TRTVLM_COMMIT=${TRTVLM_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
TRTVLM_LIBRARY=$("$TRTVLM" backend list 2>/dev/null | grep -o 'TensorRT [0-9.]*' | head -1)
export TRTVLM_COMMIT TRTVLM_LIBRARY
for optional in TRTVLM_SMOLLM2 TRTVLM_TRAINED_LLAVA TRTVLM_PEERS; do
  [ -n "${!optional:-}" ] || echo "gpu: $optional is not set, so its checks are NOT run"
done
status=0
[ $# -gt 0 ] || set -- small schemes sanitize real shapes
for phase in "$@"; do
  python3 tests/gpu/checks.py "$phase" "$WORK" || status=1
done
python3 tests/gpu/report.py "$WORK" > "${RESULTS:-tests/gpu-results.md}"
exit $status
