#!/usr/bin/env bash
# One node's part of multi_node.sbatch, which starts it on each by srun: Ray, and torchrun unless the node is the engines' alone.
set -euo pipefail
. launch/slurm/job.sh

trainer_nodes=$((SLURM_NNODES - ENGINE_NODES))
has_trainers=$((SLURM_NODEID < trainer_nodes))
gpus=$GPUS_PER_NODE # that Ray may give to engines; colocated ones take turns with the trainers
if ((ENGINE_NODES > 0 && has_trainers)); then gpus=0; fi
if [ -n "$NETWORK_INTERFACE" ]; then export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE; fi
# Not /tmp/ray: it may be another user's, and what stands there would be found by other runs on this node.
ray_folder=/tmp/ray_$SLURM_JOB_ID.$SLURM_NODEID
ray='' trainers='' asked=''

stop_ray() { # not `ray stop`, which ends every Ray of this user on the node
  [ -z "$ray" ] || {
    kill -TERM "$ray" || true
    for _ in {1..45}; do kill -0 "$ray" || break; sleep 1 || true; done # it closes within 30 s
    kill -KILL -- "-$ray" || true
  } 2>/dev/null
  rm -rf "$ray_folder" "$ray_folder.log"
}
trap stop_ray EXIT

stop() { # once: torchrun drops what it is doing at a second signal
  [ -z "$asked" ] || return 0
  asked=1
  [ -z "$trainers" ] || kill -TERM "$trainers" || true
}
trap stop TERM

head_is_up() { timeout 10 bash -c "exec 3<>/dev/tcp/$HEAD_ADDRESS/$RAY_PORT" 2>/dev/null; }

wait_for_head() {
  until head_is_up; do
    if [ -n "$asked" ]; then exit 143; fi
    if ((SECONDS > 300)) || { [ -n "$ray" ] && ! kill -0 "$ray" 2>/dev/null; }; then
      echo "error: Ray's head on $HEAD_ADDRESS:$RAY_PORT did not start. Remedy: see above, or set NETWORK_INTERFACE to a network that all nodes share." >&2
      [ ! -f "$ray_folder.log" ] || cat "$ray_folder.log" >&2
      exit 1
    fi
    sleep 1 || true
  done
}

start_ray() { # in a session of its own: TERM must not reach it before the trainers have saved
  setsid ray start --block --disable-usage-stats --node-ip-address="$(launch/slurm/address.sh)" --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="$gpus" \
    --object-store-memory=268435456 --temp-dir="$ray_folder" --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --include-log-monitor=false "$@" \
    >"$ray_folder.log" 2>&1 &
  ray=$!
}

if ((SLURM_NODEID == 0)); then
  start_ray --head --port="$RAY_PORT" --include-dashboard=false --ray-client-server-port="$RAY_CLIENT_PORT"
  wait_for_head
else
  wait_for_head
  start_ray --address="$HEAD_ADDRESS:$RAY_PORT"
fi

code=0
if ((has_trainers)); then
  RAY_ADDRESS=$HEAD_ADDRESS:$RAY_PORT setsid torchrun --nnodes="$trainer_nodes" --node-rank="$SLURM_NODEID" --nproc-per-node="$GPUS_PER_NODE" \
    --master-addr="$HEAD_ADDRESS" --master-port="$TRAINER_PORT" launch/train.py "$@" &
  trainers=$!
  [ -z "$asked" ] || kill -TERM "$trainers" || true # it came before there was anybody to tell
  wait_for "$trainers" || code=$?
fi
if ((SLURM_NODEID > 0)); then # the driver, on the first node, closes the engines that run here
  SECONDS=0
  while head_is_up && kill -0 "$ray" 2>/dev/null && ((!has_trainers || SECONDS < 60)); do sleep 2 || true; done
fi
exit "$code"
