#!/usr/bin/env bash
# A LLaVA-style model with a Llama-3-8B backbone and a CLIP-like tower on 8-GPU H100 nodes, with ReGATE.
#
#   bash llava_8b.sh teacher     once: the backbone's Hugging Face weights become the frozen text-only teacher
#   bash llava_8b.sh references  once, optional: the teacher's losses for the whole data set, kept in $CACHE
#   bash llava_8b.sh train       trains; the same command again resumes from the last checkpoint in $SAVE
#
#   DRY_RUN=1 bash llava_8b.sh train    tries the line on this machine's CPU (no GPU, nothing written to your folders)
#   LAUNCH=echo bash llava_8b.sh train  prints the line
#
# One node: as it is. Several nodes: slurm.sbatch sets NNODES and RANK0 and runs this on each. README.md explains it all.
set -euo pipefail

# --- yours -----------------------------------------------------------------------------------------------------------
MEGATRON=${MEGATRON:?set it to your checkout of Megatron-LM}
SCRIPT=${SCRIPT:-$MEGATRON/pretrain_vlm.py}    # NVIDIA's has mock images; yours has your data set behind the same batches
DATA_FLAGS=${DATA_FLAGS:---mock-data}          # what your script needs to find its data
HF_BACKBONE=${HF_BACKBONE:-/models/Meta-Llama-3-8B}  # Hugging Face folder: weights and tokenizer of the backbone
TEACHER=${TEACHER:-/checkpoints/llama3_8b_teacher}
START=${START-}                                # a LLaVA checkpoint to start from; empty: from random weights
SAVE=${SAVE:-/checkpoints/llava_8b}
CACHE=${CACHE-/cache/llava_8b_references}      # empty: reference losses are computed as rows come, and forgotten
LOGS=${LOGS:-/logs/llava_8b}
REGATE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)  # this repository

# --- size of the cluster ---------------------------------------------------------------------------------------------
NNODES=${NNODES:-1} GPUS=${GPUS:-8}            # nodes, GPUs on each
RANK0=${RANK0:-localhost:29500}                # where the ranks meet: a host all nodes reach, and a free port
TP=${TP:-4}                                    # 8B in bf16 with its optimizer: 4 GPUs of 80 GB hold a replica easily
PP=${PP:-1}                                    # more than one stage from 70B on; stages run the short length as well
PRECISION=${PRECISION:-bf16}                   # bf16 | fp8

LAYOUT=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"   # what is left of the ranks is data-parallel
    --use-distributed-optimizer                # optimizer states are shared out among data-parallel ranks
)
MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32   # Llama-3-8B's sizes
    --group-query-attention --num-query-groups 8   # its 8 heads of keys and values
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights   # its layers
    --position-embedding-type rope --rotary-base 500000   # its positions; kept tokens keep theirs
    --attention-dropout 0 --hidden-dropout 0   # as it was trained
    --img-h 336 --img-w 336 --patch-dim 14     # 576 visual tokens per picture; all run, but see docs/visual.md
    --seq-length 576                           # of the vision tower
    --dataloader-seq-length 2048 --max-position-embeddings 8192   # text per row; longest merged row
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$HF_BACKBONE"   # must be the teacher's own
    --make-vocab-size-divisible-by 128         # as converted; TP divides it
)
case $PRECISION in
    bf16) NUMBERS=(--bf16) ;;
    # Current scaling: every step has its own ranges, dense or sparse. Kept lengths are aligned for FP8.
    fp8) NUMBERS=(--bf16 --fp8-format hybrid --fp8-recipe tensorwise) ;;
    *) echo "PRECISION: given $PRECISION; allowed bf16, fp8" >&2; exit 1 ;;
esac
TRAINING=(
    --micro-batch-size 1 --global-batch-size 256   # rows per forward, rows per step over all ranks
    --train-iters 20000                        # about 5M rows
    --calculate-per-token-loss                 # rows keep different numbers of targets: weigh tokens alike
    --lr 2e-5 --min-lr 2e-6 --lr-decay-style cosine --lr-warmup-iters 600   # usual for tuning a trained backbone
    --weight-decay 0.05 --clip-grad 1.0        # the same
    --recompute-granularity selective          # attention is recomputed: memory for a few percent of time
    --no-rope-fusion                           # fused RoPE was never run with ReGATE, for want of a GPU
    --eval-interval 1000 --eval-iters 10       # evaluation is always dense
)
STATE=(
    --ckpt-format torch                        # pretrain_vlm.py insists on it
    --save "$SAVE" --load "$SAVE" --save-interval 1000   # --load $SAVE: a restart resumes, ReGATE's state included
)
# weights only: its optimizer and iteration stay behind
if [[ -n $START ]]; then STATE+=(--pretrained-checkpoint "$START"); fi
MONITORING=(
    --log-interval 10 --log-throughput         # a line per 10 steps; TFLOP/s of the FLOPs that ran
    --log-timers-to-tensorboard --tensorboard-dir "$LOGS/tensorboard"   # ours under regate/
    --distributed-timeout-minutes 60           # the first step may wait for a slow file system
)
ELISION=(
    --regate --regate-teacher-load "$TEACHER"  # on; the frozen text-only teacher, sharded as the student
    --regate-keep-ratio 0.5 --regate-dense-layers 1   # half of the answer tokens; the first layer sees all of them
    --regate-warmup-steps 100 --regate-cycle-steps 128 --regate-dense-steps 16   # the paper's schedule
)
# its losses are kept, 2 bytes per target, and not computed again
if [[ -n $CACHE ]]; then ELISION+=(--regate-reference-cache "$CACHE"); fi
read -r -a DATA <<<"$DATA_FLAGS"
FLAGS=("${LAYOUT[@]}" "${MODEL[@]}" "${NUMBERS[@]}" "${TRAINING[@]}" "${STATE[@]}" "${MONITORING[@]}" "${DATA[@]}")

export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONPATH=$REGATE:$MEGATRON${PYTHONPATH:+:$PYTHONPATH}
TORCHRUN=(torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS" --rdzv-backend c10d --rdzv-endpoint "$RANK0")
launch() {  # DRY_RUN=1: the same words, tried on CPU instead
    if [[ -n ${DRY_RUN-} ]]; then
        ${LAUNCH-} python -m regate_megatron dry-run ${DRY_RUN_FLAGS-} "$@"
    else
        ${LAUNCH-} "$@"
    fi
}

case ${1:-train} in
    teacher)
        ${LAUNCH-} python "$REGATE/tools/convert_hf_teacher.py" --source "$HF_BACKBONE" --target "$TEACHER" \
            --tensor-model-parallel-size "$TP" ;;
    references)
        : "${CACHE:?set it to a folder that every node sees}"
        ${LAUNCH-} "${TORCHRUN[@]}" "$REGATE/tools/precompute_references.py" "$SCRIPT" "${FLAGS[@]}" "${ELISION[@]}" ;;
    train)
        launch "${TORCHRUN[@]}" -m regate_megatron "$SCRIPT" "${FLAGS[@]}" "${ELISION[@]}" --regate-trace "$LOGS/trace" ;;
    *) echo "given $1; allowed teacher, references, train" >&2; exit 1 ;;
esac
