#!/usr/bin/env bash
# sbatch --nodes 4 launch/slurm.sh recipes/quickstart.yaml [section.key=value ...]
#SBATCH --job-name=rlpost
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:INT@120
# SIGINT two minutes before the limit: rlpost saves and says how to resume; start again with resume=auto.
set -euo pipefail
: "${1:?usage: sbatch --nodes N launch/slurm.sh RECIPE [section.key=value ...]}"
gpus=${GPUS_PER_NODE:-8}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c '
  exec .venv/bin/accelerate launch --config_file launch/nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * '"$gpus"'))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip '"$head"' --main_process_port 29500 -m rlpost "$@"' _ "$@" &
srun_pid=$!
trap 'kill -INT "$srun_pid"' INT TERM
wait "$srun_pid"
