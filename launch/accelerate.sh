#!/usr/bin/env bash
# Starts training with `accelerate launch` and a strategy: how the training state is spread over processes.
#
#   launch/accelerate.sh STRATEGY [train|doctor] [RECIPE] [--flag value ...]
#
#   launch/accelerate.sh ddp --data ~/photos                        one process on each GPU of this machine
#   CUDA_VISIBLE_DEVICES=0,1 launch/accelerate.sh zero2 ...         on two of its GPUs
#   NPROC_PER_NODE=2 launch/accelerate.sh ddp --data ~/photos       two processes, on CPUs if there is no GPU
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 launch/accelerate.sh ddp ...   first of two nodes; NODE_RANK=1 on the other
#   DRY_RUN=1 launch/accelerate.sh fsdp2                            shows the command and starts nothing
#
# STRATEGY is a file of configs/accelerate without its ending, or the path of a configuration of your own.
# `launch/accelerate.sh ddp train --help` lists the options of the training. Environment variables: launch/README.md.
set -euo pipefail

configs=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")/configs/accelerate
strategies=("$configs"/*.yaml)
strategies=("${strategies[@]##*/}")
strategies=("${strategies[@]%.yaml}")

usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  printf '\nstrategies:\n'
  for name in "${strategies[@]}"; do
    printf '  %-15s %s\n' "$name" "$(sed -n '1s/^# *//p' "$configs/$name.yaml")"
  done
}
case ${1:-} in
  -h | --help | help) usage; exit 0 ;;
  '') usage >&2; exit 2 ;;
esac
strategy=$1
shift
# shellcheck source=launch/topology.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/topology.sh"

config=$configs/$strategy.yaml
if [[ $strategy == */* || $strategy == *.yaml || $strategy == *.yml ]]; then
  config=$strategy strategy=own
  [[ -f $config ]] || fail "there is no file $config; give a strategy (${strategies[*]}) or the path of a configuration"
  grep -q distributed_type -- "$config" || fail "$config is no configuration of Accelerate (no distributed_type);" \
    "the strategy comes first: launch/accelerate.sh STRATEGY [train|doctor] [RECIPE]"
elif [[ $strategy == -* ]]; then
  fail "the strategy comes first: launch/accelerate.sh STRATEGY $strategy ...; there are ${strategies[*]}"
elif [[ ! -f $config ]]; then
  near=$("$PYTHON" -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], n=1))' \
    "$strategy" "${strategies[@]}")
  fail "unknown strategy $strategy; ${near:+did you mean $near? }there are ${strategies[*]}"
fi

packages=(torch vit_dist accelerate)
flags=()
if [[ $strategy == single ]]; then
  [[ ${NNODES:-1} == 1 && ${NPROC_PER_NODE:-1} == 1 ]] ||
    fail "single is one process, but NNODES is ${NNODES:-1} and NPROC_PER_NODE is ${NPROC_PER_NODE:-1}; use ddp"
  NPROC_PER_NODE=1
fi
topology
case $strategy in
  ddp)
    if ((PROCESSES == 1)); then
      strategy=single
      note "one process: nothing to average, so it is started as single"
    elif ((NNODES > 1)); then
      config=$configs/ddp_multinode.yaml
    fi ;;
  ddp_multinode)
    ((NNODES > 1)) || fail "ddp_multinode is for several nodes, but NNODES is 1; set NNODES, NODE_RANK and" \
      "MASTER_ADDR on every node, or use ddp" ;;
  fsdp2)
    ((PROCESSES > 1)) || fail "fsdp2 has nothing to shard over with one process; set NPROC_PER_NODE to 2 or more," \
      "or use single" ;;
  hsdp)
    HSDP_REPLICAS=${HSDP_REPLICAS:-$NNODES}
    whole HSDP_REPLICAS 1 "$PROCESSES"
    ((HSDP_REPLICAS > 1)) || fail "hsdp with 1 replica is fsdp2; use fsdp2, or set HSDP_REPLICAS to 2 or more"
    ((PROCESSES % HSDP_REPLICAS == 0 && PROCESSES > HSDP_REPLICAS)) || fail "hsdp cannot shard each of $HSDP_REPLICAS" \
      "replicas over $PROCESSES / $HSDP_REPLICAS processes; start more processes, or use ddp or fsdp2"
    # Accelerate takes the sizes from the command line only if --use_fsdp stands there too.
    flags=(--use_fsdp --fsdp_version 2 --use_parallelism_config
      --parallelism_config_dp_replicate_size "$HSDP_REPLICAS"
      --parallelism_config_dp_shard_size $((PROCESSES / HSDP_REPLICAS))) ;;
  zero*) packages+=(deepspeed) ;;
esac
require "${packages[@]}"
# Accelerate adds nothing to one process, and a signal to its launcher would not reach it.
if [[ $strategy == single ]]; then start "$PYTHON" -m "$MODULE" "$@"; fi

# All counts on the command line, where they win over the file's. --num_processes is of all nodes, unlike torchrun's.
# --config_file always, or ~/.cache/huggingface/accelerate/default_config.yaml would decide. Port 0: a free one.
launcher=("$PYTHON" -m vit_dist.launcher accelerate.commands.launch --config_file "$config"
  --num_processes "$PROCESSES" --num_machines "$NNODES" --machine_rank "$NODE_RANK"
  --main_process_ip "$MASTER_ADDR" --main_process_port "${MASTER_PORT:-0}")
if ((NNODES > 1)); then launcher+=(--same_network); fi
if ((${#flags[@]})); then launcher+=("${flags[@]}"); fi
start "${launcher[@]}" -m "$MODULE" "$@"
