#!/usr/bin/env bash
# Trains on a Cloud TPU slice of several machines (v4, v5e, v5p, v6e), one process for each machine.
#
#   export TPU=tap ZONE=us-central2-b TYPE=v4-32 NFS=10.0.0.2:/share
#   bash launch/tpu_pod.sh [--dry-run] create       asks for the slice and waits for it
#   bash launch/tpu_pod.sh [--dry-run] install      puts this commit on all its machines
#   bash launch/tpu_pod.sh [--dry-run] train --config=configs/flava.py --workdir=/mnt/tap/runs/flava \
#       --config.data.root=/mnt/tap/data            starts the run, which does not depend on this terminal
#   bash launch/tpu_pod.sh [--dry-run] log          shows what process 0 prints, until Ctrl-C
#   bash launch/tpu_pod.sh [--dry-run] stop         saves after the round in progress and ends the run
#   bash launch/tpu_pod.sh [--dry-run] delete       gives the slice back
#
# Needs gcloud, logged in and with a project set, quota for TYPE in ZONE, and NFS: an NFS share in the slice's network,
# such as a Filestore instance, which is mounted at /mnt/tap. Workdir and data go there, since all machines must see the
# workdir, and files are written as on any disk: gs:// addresses do not work, and a bucket mounted with gcsfuse has no
# atomic renames, on which checkpoints rely.
# RUNTIME is the machines' image (default: TYPE's); SPOT=1 asks for a spot slice; NETWORK is the network's name.
# --dry-run prints the commands of a step and starts none.
#
# What resumes: the same `train` goes on from the last checkpoint, after `stop`, after a crash, and after a spot slice
# has been taken away and `delete`, `create` and `install` have made another, of any size.
#
# Only ever run with --dry-run, and gcloud's flags checked against its help; not yet on a slice. TPU7x and later are not
# to be had this way: use launch/gke.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    echo "usage: $0 [--dry-run] create|install|train|log|stop|delete [ARGUMENT ...]; see its first lines" >&2
    exit 2
}
show() { local line; line=$(printf ' %q' "$@"); echo "${line:1}"; }
dry_run=''
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
start() { if [[ $dry_run ]]; then show "$@"; else "$@"; fi; }
(($#)) || usage
step=$1
shift
: "${TPU:?set it to a name for the slice}" "${ZONE:?set it to a zone that has the TPU type}"

on_all() { start gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"; }

create() {
    : "${TYPE:?set it to the accelerator type, such as v4-32 or v6e-16}"
    local options=() runtime=${RUNTIME:-}
    case $TYPE in
        v6e-*) runtime=${runtime:-v2-alpha-tpuv6e} ;;
        v5p-*) runtime=${runtime:-v2-alpha-tpuv5} ;;
        v5litepod-*) runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
        v[234]-*) runtime=${runtime:-tpu-ubuntu2204-base} ;;
        *) : "${runtime:?set RUNTIME to the image for $TYPE}" ;;
    esac
    [[ ! ${SPOT:-} ]] || options+=(--spot)
    [[ ! ${NETWORK:-} ]] || options+=(--network="$NETWORK")
    start gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$runtime" "${options[@]}"
    state=(gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE" "--format=value(state.state)")
    start "${state[@]}"
    [[ ! $dry_run ]] || return 0
    local now=''
    until [[ $now == ACTIVE ]]; do
        if [[ $now == FAILED || $now == SUSPENDED ]]; then echo "$0: the request is $now; delete it" >&2; exit 1; fi
        sleep 30
        now=$("${state[@]}")
    done
}

# The images have Python 3.10; uv brings the 3.11 that constraints.txt is for.
remote_install='set -e
python3 -m pip install --quiet --user uv
rm -rf tap-jax && mkdir tap-jax && tar -xzf tap-jax.tar.gz -C tap-jax
~/.local/bin/uv venv --quiet --allow-existing --python 3.11 tap-env
~/.local/bin/uv pip install --quiet --python tap-env/bin/python -c tap-jax/constraints.txt -e "./tap-jax[tpu]"
if ! mountpoint -q /mnt/tap; then
    sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common
    sudo mkdir -p /mnt/tap && sudo mount -t nfs NFS /mnt/tap && sudo chmod a+rwx /mnt/tap
fi'

install() {
    : "${NFS:?set it to HOST:/SHARE, an NFS share for workdir and data}"
    local archive=tap-jax.tar.gz
    [[ $dry_run ]] || archive=$(mktemp -d)/$archive
    start git archive --format=tar.gz --output="$archive" HEAD
    start gcloud compute tpus tpu-vm scp "$archive" "$TPU:tap-jax.tar.gz" --zone="$ZONE" --worker=all
    on_all "${remote_install/NFS/$NFS}"
}

train() {
    local words
    words=$(show tap-env/bin/tap-jax train --coordinator=auto "$@")
    # From the project's folder, so that configs/ is found. With && there, $! would be a shell's, which passes nothing on.
    on_all "cd tap-jax || exit
JAX_COMPILATION_CACHE_DIR=/mnt/tap/xla nohup ../$words >../train.log 2>&1 </dev/null &
echo \$! >../train.pid"
}

case $step in
    create | install) "$step" ;;
    train)
        if [[ " $* " != *" --config"* || " $* " != *" --workdir"* ]]; then usage; fi
        train "$@"
        ;;
    log) start gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 --command="tail -n 100 -F train.log" ;;
    stop) on_all "kill -TERM \$(cat train.pid)" ;;
    delete) start gcloud compute tpus queued-resources delete "$TPU" --zone="$ZONE" --force --quiet ;;
    *) usage ;;
esac
