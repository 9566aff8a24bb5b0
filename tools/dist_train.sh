#!/usr/bin/env bash
# usage: tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# On several nodes, call it on each with NNODES, NODE_RANK, MASTER_ADDR and PORT set. Without a GPU the
# processes are joined by gloo.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n 2,4p "$0" >&2
    exit 2
fi
python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
