#!/bin/sh
# The GPU rows of docs/results.md: boundary, prompt, training, decoding and drafting on the shapes of Qwen3-8B with random
# weights. Under 8 minutes on one H100 with 80 GB, no network; adds to benchmarks/results.
#
#   benchmarks/h100.sh
#   MODEL=tiny DEVICE=cpu DTYPE=float32 TOKENS=64 LENGTH=64 WIDTH=64 VOCABULARY=64 LOSSES=all-logits \
#       benchmarks/h100.sh      the same path on any CPU
#
# Baselines train in pairs and at 2,048 tokens: each process holds a base of its own, and LoRA's step needs 20 GB more.
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=src
: "${PYTHON:=python3}" "${MODEL:=qwen3-8b-random}" "${DEVICE:=cuda}" "${DTYPE:=bfloat16}"
: "${TOKENS:=8192}" "${LENGTH:=2048}" "${WIDTH:=4096}" "${VOCABULARY:=151936}" "${LOSSES:=all-logits,liger}" "${REPEATS:=3}" "${OUT:=benchmarks/results}"

failed=0
bench() {
    "$PYTHON" -m benchmarks "$@" --repeats "$REPEATS" --device "$DEVICE" --dtype "$DTYPE" --out "$OUT" --quiet ||
        failed=1 # one that does not fit must not cost the others
}

bench boundary --tokens "$TOKENS" --width "$WIDTH" --adapter-dtype "$DTYPE"
bench head --baselines "$LOSSES" --rows "$LENGTH" --width "$WIDTH" --vocabulary "$VOCABULARY"
bench train --model "$MODEL" --batch 1 --length "$LENGTH" --labelled 1.0 --baselines lora
bench train --model "$MODEL" --batch 1 --length "$LENGTH" --labelled 1.0 --baselines peft-shadow
bench memory --model "$MODEL" --batch 1 --lengths "$LENGTH" --phases train --baselines lora
bench decode --model "$MODEL" --adapter-dtype "$DTYPE" --batch 1 --prompt "$TOKENS" --new 2 --baselines base
bench decode --model "$MODEL" --adapter-dtype "$DTYPE" --batch 1 --new 32 --baselines base,lora
bench decode --model "$MODEL" --adapter-dtype "$DTYPE" --batch 1 --new 32 --candidate shadow-compiled --baselines base-compiled
bench evaluate --model "$MODEL" --rows 8 --batch 8 --new 8 --baselines one-by-one
bench speculate --model "$MODEL" --candidate speculate-4 --baselines attached,base --rows 1 --new 32
bench passes --model "$MODEL" --tokens 1,4,8,16 --baselines base,drafting
bench serving --model "$MODEL" --streams 16 --adapters 2 --baselines batched
exit "$failed"
