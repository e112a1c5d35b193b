#!/usr/bin/env bash
# Trains on a GKE cluster (or another Kubernetes cluster) as a JobSet: one pod for each node, one process in each pod.
#
#   export IMAGE=europe-docker.pkg.dev/PROJECT/REPOSITORY/tap-jax CLAIM=tap
#   bash launch/gke.sh [--dry-run] NAME --config=configs/flava.py --workdir=/mnt/tap/runs/flava [ARGUMENT ...]
#   NODES=4 DEVICES=8 ACCELERATOR=nvidia-h100-80gb bash launch/gke.sh NAME ...
#   NODES=4 DEVICES=4 ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 bash launch/gke.sh NAME ...
#
# NODES (2) nodes with DEVICES (4) devices each of the kind ACCELERATOR (nvidia-tesla-a100: the A100 with 40 GB), the
# node pool's label cloud.google.com/gke-accelerator. With TOPOLOGY it is a TPU slice: ACCELERATOR and TOPOLOGY are the
# pool's labels gke-tpu-accelerator and gke-tpu-topology, NODES the slice's machines and DEVICES the chips of each.
# IMAGE has tap-jax installed with [gpu] or [tpu] and the project's folder as its working directory:
#   FROM python:3.11
#   COPY . /tap-jax
#   WORKDIR /tap-jax
#   RUN pip install -c constraints.txt -e '.[gpu]'
# CLAIM is a ReadWriteMany volume claim, such as one of Filestore, mounted at /mnt/tap in all pods. Workdir and data go
# there; gs:// addresses do not work, and gcsfuse has no atomic renames, on which checkpoints rely.
# GRACE (120) are the seconds between SIGTERM and SIGKILL, at least those of a round and a checkpoint; RESTARTS (20) is
# how often all pods are started again; PORT (8476) is the coordinator's. --dry-run prints what kubectl would be given.
#
# Needs kubectl with the cluster as its context, and JobSet (v0.6 or later) in the cluster:
#   kubectl apply --server-side -f https://github.com/kubernetes-sigs/jobset/releases/download/v0.10.1/manifests.yaml
# Then: kubectl logs -f NAME-worker-0-0-... (kubectl get pods), kubectl get jobset NAME, kubectl delete jobset NAME.
#
# What resumes: when a pod is lost or its node is taken away (SIGTERM: the state is saved after the round in progress,
# status 143) the JobSet starts all pods again, and they go on from the last checkpoint. It fails for good at status 1
# and 2. After `kubectl delete jobset NAME` the same command goes on as well, with another number of nodes too.
#
# Only ever run with --dry-run, and the fields checked against JobSet's definition; not yet in a cluster.
# shellcheck disable=SC2034 # what the template takes is read by name
set -euo pipefail

usage() {
    echo "usage: $0 [--dry-run] NAME --config=FILE --workdir=DIR [ARGUMENT ...]; see its first lines" >&2
    exit 2
}
dry_run=''
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
[[ ${1:-} =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || usage # a name that Kubernetes takes
NAME=$1
shift
if [[ " $* " != *" --config"* || " $* " != *" --workdir"* ]]; then usage; fi
: "${IMAGE:?set it to an image in which tap-jax is installed}" "${CLAIM:?set it to a ReadWriteMany volume claim}"
NODES=${NODES:-2} DEVICES=${DEVICES:-4} GRACE=${GRACE:-120} RESTARTS=${RESTARTS:-20} PORT=${PORT:-8476}
ACCELERATOR=${ACCELERATOR:-nvidia-tesla-a100}

if [[ ${TOPOLOGY:-} ]]; then # GKE tells each pod of a slice who it is
    RESOURCE=google.com/tpu
    NODE_SELECTOR="{cloud.google.com/gke-tpu-accelerator: $ACCELERATOR, cloud.google.com/gke-tpu-topology: $TOPOLOGY}"
    ANNOTATIONS='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}' # all pods on one slice
    processes=(--coordinator=auto)
else
    RESOURCE=nvidia.com/gpu
    NODE_SELECTOR="{cloud.google.com/gke-accelerator: $ACCELERATOR}"
    ANNOTATIONS='{}'
    processes=("--coordinator=$NAME-worker-0-0.$NAME:$PORT" "--processes=$NODES" "--process=\$(JOB_COMPLETION_INDEX)")
fi

quoted() { # words -> a YAML list; Kubernetes would take their $(...) for a variable
    local word list=''
    for word; do
        word=${word//\'/\'\'}
        list+=", '$word'"
    done
    echo "[${list:2}]"
}
ARGUMENTS=$(quoted "${@//\$\(/\$\$(}" "${processes[@]}")

template=$(<"$(dirname "$0")/gke_jobset.yaml")
for name in NAME ANNOTATIONS RESTARTS NODES GRACE NODE_SELECTOR RESOURCE IMAGE ARGUMENTS PORT DEVICES CLAIM; do
    template=${template//"\${$name}"/"${!name}"}
done

if [[ $dry_run ]]; then
    echo "kubectl apply --server-side -f - <<'EOF'"
    printf '%s\nEOF\n' "$template"
else
    kubectl apply --server-side -f - <<<"$template"
fi
