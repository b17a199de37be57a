#!/bin/sh
# All measurements for one GPU, with random weights and no network; adds to benchmarks/results (NAME.csv, NAME.md).
#   1. The shape of PEFT's own benchmark (Llama-3.2-3B, 4 x 768 tokens, bfloat16): tokens/s and peak memory of a training
#      step of the shadow against LoRA, LoRA with liger-kernel's fused operations, and PEFT's Shadow tuner.
#   2. The shape of Qwen3-8B: boundary, head, training, prompt, decoding, drafting and serving.
#
#   pip install 'shadowtune[bench]' liger-kernel
#   benchmarks/gpu.sh              both parts, for 80 GB of memory
#   PARTS=3b benchmarks/gpu.sh     one part: 3b, or 8b
#   TRITON_INTERPRET=1 REPEATS=1 MODEL_3B=tiny BATCH_3B=1 LENGTH_3B=16 MODEL=tiny DEVICE=cpu DTYPE=float32 TOKENS=64 \
#       LENGTH=64 WIDTH=64 VOCABULARY=64 LOSSES=all-logits OUT=/tmp/gpu-dry-run benchmarks/gpu.sh
#                                  the same path on any CPU, before GPU time is spent; its figures mean nothing
#   FUSED=                         leaves liger-kernel out
#
# Baselines train in pairs: each process holds a base of its own, and at 8B LoRA's step needs 20 GB more.
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=src
: "${PYTHON:=python3}" "${MODEL:=qwen3-8b-random}" "${DEVICE:=cuda}" "${DTYPE:=bfloat16}"
: "${PARTS:=3b,8b}" "${MODEL_3B:=llama-3.2-3b-random}" "${BATCH_3B:=4}" "${LENGTH_3B:=768}" "${FUSED=lora-liger}"
: "${TOKENS:=8192}" "${LENGTH:=2048}" "${WIDTH:=4096}" "${VOCABULARY:=151936}" "${LOSSES:=all-logits,liger}" "${REPEATS:=3}" "${OUT:=benchmarks/results}"

failed=0
bench() {
    "$PYTHON" -m benchmarks "$@" --repeats "$REPEATS" --device "$DEVICE" --dtype "$DTYPE" --out "$OUT" --quiet ||
        failed=1 # one that does not fit must not cost the others
}

train_3b() {
    bench train --model "$MODEL_3B" --batch "$BATCH_3B" --length "$LENGTH_3B" --labelled 1.0 --baselines "$1"
}

case ",$PARTS," in *,3b,*)
    train_3b lora
    if [ -n "$FUSED" ]; then train_3b "$FUSED"; fi
    train_3b peft-shadow
    train_3b shadow-recommended
    bench memory --model "$MODEL_3B" --batch "$BATCH_3B" --lengths "$LENGTH_3B" --phases train --baselines lora
    if [ -n "$FUSED" ]; then
        bench memory --model "$MODEL_3B" --batch "$BATCH_3B" --lengths "$LENGTH_3B" --phases train --baselines "$FUSED"
    fi
    ;;
esac

case ",$PARTS," in *,8b,*) ;; *) exit "$failed" ;; esac
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
bench prefix --model "$MODEL" --adapters 4 --shared "$LENGTH"
bench serving --model "$MODEL" --streams 16 --adapters 2 --baselines batched
exit "$failed"
