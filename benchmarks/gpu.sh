#!/usr/bin/env bash
# What only a GPU can show, in about eight minutes; every part has a limit of its own and leaves what it has.
#
#   benchmarks/gpu.sh FOLDER
#
# Environment: PYTHON (default .venv/bin/python, else python3), TESTS_S and OFFLOAD_S (seconds, default 150 and 280).
# Without vLLM for CUDA the parts that need it are skipped.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?benchmarks/gpu.sh FOLDER}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$out/extensions}
nvidia-smi -L || { echo "gpu.sh: no GPU is to be seen here" >&2; exit 2; }

# DeepSpeed's AdamW for the CPU takes a minute to build: beside the tests, so that no benchmark waits for it.
mkdir -p "$TORCH_EXTENSIONS_DIR"
"$python" -c "from benchmarks.offload import build_cpu_adam; import os; print(build_cpu_adam(dict(os.environ), 150) or 'built')" > "$out/cpu-adam.log" 2>&1 &
timeout "${TESTS_S:-150}" "$python" -m pytest -v -p no:cacheprovider --continue-on-collection-errors -m gpu tests 2>&1 | tee "$out/tests.log" | grep -E "PASSED|FAILED|ERROR|passed|failed"
wait
timeout -k 20 "$(( ${OFFLOAD_S:-280} + 30 ))" "$python" -m benchmarks.offload --gpu --repeats 1 --minutes "$(( ${OFFLOAD_S:-280} / 60 ))" --out "$out/offload.json" 2>&1 | tee "$out/offload.log"
