#!/usr/bin/env bash
# A Prefect worker whose machine is a member of a Ray cluster, without processors for Ray's own work. A flow that the
# worker starts joins the local Ray processes and is a driver of the cluster.
#   TRIP_RAY_HEAD=host:6379 bash infra/kubernetes/worker.sh
set -euo pipefail

head=${TRIP_RAY_HEAD:?set it to the address of the Ray head, host:6379}
for attempt in {1..60}; do
    # Ray's own start waits for minutes without a word where no head responds.
    timeout 60 ray start --address="$head" --num-cpus=0 --num-gpus=0 --object-store-memory=300000000 \
        --disable-usage-stats && break
    [ "$attempt" -lt 60 ] || { echo "worker: no Ray head at $head" >&2; exit 1; }
    echo "worker: no Ray head at $head yet" >&2
    sleep 5
done
export RAY_ADDRESS=$head
# exec: the signal that stops the pod must reach the worker
exec prefect worker start --pool "${TRIP_POOL:-trip-local}" --type process
