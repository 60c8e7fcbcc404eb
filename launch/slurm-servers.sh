#!/usr/bin/env bash
# SERVER_NODES=1 sbatch --nodes 4 launch/slurm-servers.sh RECIPE [section.key=value ...]
#
# Learners on the first nodes of the job, a vLLM server on each of the last SERVER_NODES; set rollout.engine.tensor_parallel and
# replicas so that a server uses its node's cards. Weights go by WEIGHTS_FOLDER, which all nodes must see. Use a cluster whose
# nodes only you, or people you trust, can reach: who reaches a server can replace its weights (docs/rollouts.md).
#SBATCH --job-name=rlpost
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
# SIGUSR1 as in slurm.sh; servers take no notice of it, and end with the learners.
set -euo pipefail
: "${1:?usage: SERVER_NODES=1 sbatch --nodes N launch/slurm-servers.sh RECIPE [section.key=value ...]}"
gpus=${GPUS_PER_NODE:-8} servers=${SERVER_NODES:-1} port=${SERVER_PORT:-8000} config=${LAUNCH_FILE:-launch/nodes.yaml}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
learners=$((${#nodes[@]} - servers))
if ((servers < 1 || learners < 1)); then
  echo "SERVER_NODES=$servers of ${#nodes[@]} nodes leaves $learners for learners. Take at least one node for each side." >&2
  exit 2
fi
list() { local IFS=,; echo "$*"; }
serving=("${nodes[@]:learners}")
urls=$(list "${serving[@]/%/:$port}")
set -- "$@" rollout.engine.where=server "rollout.engine.urls=[http://${urls//,/,http://}]" \
  "rollout.engine.weights_folder=${WEIGHTS_FOLDER:-$PWD/runs/weights-$SLURM_JOB_ID}"

srun --nodes="$servers" --ntasks="$servers" --nodelist="$(list "${serving[@]}")" bash -c '
  trap "" USR1
  exec .venv/bin/python -m rlpost serve "$@" --host "$SLURMD_NODENAME" --port '"$port" _ "$@" &
trap 'kill '$!' 2>/dev/null || true; wait' EXIT

srun --kill-on-bad-exit=1 --nodes="$learners" --ntasks="$learners" --nodelist="$(list "${nodes[@]:0:learners}")" bash -c '
  trap "" USR1
  exec .venv/bin/python -m rlpost.run.launch --config_file '"$config"' \
    --num_machines '"$learners"' --num_processes '$((learners * gpus))' --machine_rank "$SLURM_NODEID" \
    --main_process_ip '"${nodes[0]}"' --main_process_port 29500 -m rlpost "$@"' _ "$@"
