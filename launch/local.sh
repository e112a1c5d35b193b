#!/usr/bin/env bash
# Trains with several processes on this machine, which meet over loopback: one for each GPU or share of them, or, on the
# CPU, one for each share of the cores. It is for trying out what runs over several machines: on one machine a single
# process, which holds data and programs once, drives all devices, and `tap-jax train` is all it takes.
#
#   bash launch/local.sh [--dry-run] PROCESSES --config=FILE --workdir=DIR [further arguments of tap-jax train]
#   bash launch/local.sh 2 --config=configs/demo.py --workdir=runs/demo
#
# Needs tap-jax on the PATH; for GPUs nvidia-smi, unless CUDA_VISIBLE_DEVICES names them. JAX_PLATFORMS=cpu leaves them
# alone. PORT is the coordinator's (default: any). --dry-run prints the commands and starts none.
#
# Process 0 prints what the run has to say. SIGTERM and Ctrl-C go to all: the state is saved after the round in progress
# (status 143), again stops at once. When one process fails the others have PATIENCE (20) seconds to notice and are then
# killed; the status is that of the first to fail.
# The same command goes on from the last checkpoint, also with another number of processes.
set -euo pipefail

usage() { echo "usage: $0 [--dry-run] PROCESSES --config=FILE --workdir=DIR [ARGUMENT ...]" >&2; exit 2; }
show() { local line; line=$(printf ' %q' "$@"); echo "${line:1}"; }
dry_run=''
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || usage
count=$1
shift
port=${PORT:-$((20000 + RANDOM % 10000))}

gpus=()
if [[ ${JAX_PLATFORMS:-} != cpu ]]; then
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
    fi
fi
if ((${#gpus[@]} % count)); then
    echo "$0: ${#gpus[@]} GPUs do not divide among $count processes; set CUDA_VISIBLE_DEVICES or JAX_PLATFORMS=cpu" >&2
    exit 2
fi

cores=() # those that this shell may use, such as 0-3,8
if ((!${#gpus[@]})) && command -v taskset >/dev/null; then
    for range in $(taskset -cp $$ | sed 's/.*: //; s/,/ /g'); do
        mapfile -t -O "${#cores[@]}" cores < <(seq "${range%-*}" "${range#*-}")
    done
fi

join() { local IFS=,; echo "$*"; }
of_process() { # index -> command: the words that start it
    command=()
    local share
    if ((${#gpus[@]})); then
        share=$((${#gpus[@]} / count))
        command+=(env "CUDA_VISIBLE_DEVICES=$(join "${gpus[@]:$1*share:share}")")
    elif ((${#cores[@]} >= count)); then
        share=$((${#cores[@]} / count))
        command+=(taskset -c "$(join "${cores[@]:$1*share:share}")")
    fi
    command+=(tap-jax train "${arguments[@]}" "--coordinator=127.0.0.1:$port" "--processes=$count" "--process=$1")
}

arguments=("$@") running=()
for ((i = 0; i < count; i++)); do
    of_process "$i"
    if [[ $dry_run ]]; then show "${command[@]}"; else "${command[@]}" & running+=($!); fi
done

asked='' status=0 deadline=''
trap 'asked=1; kill -TERM "${running[@]}" 2>/dev/null || true' TERM INT
while ((${#running[@]})); do
    sleep 0.2 || true
    for i in "${!running[@]}"; do
        kill -0 "${running[i]}" 2>/dev/null && continue
        code=0
        wait "${running[i]}" 2>/dev/null || code=$?
        unset "running[i]"
        if ((code && !status)); then
            status=$code
            if [[ ! $asked ]]; then
                echo "$0: process $i has ended with status $status, so the others have to end too" >&2
                deadline=$((SECONDS + ${PATIENCE:-20}))
            fi
        fi
    done
    if [[ $deadline ]] && ((SECONDS > deadline)); then kill -KILL "${running[@]}" 2>/dev/null || true; fi
done
exit "$status"
