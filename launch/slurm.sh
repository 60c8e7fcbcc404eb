#!/usr/bin/env bash
# sbatch --nodes 4 launch/slurm.sh recipes/quickstart.yaml [section.key=value ...]
#SBATCH --job-name=rlpost
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
# SIGUSR1 five minutes before the limit: rlpost finishes its step, saves and ends; start again with resume=auto. Not SIGINT or
# SIGTERM: torch's launcher kills the processes 30 s after it has seen one. It is told to ignore SIGUSR1 (the trap below).
set -euo pipefail
: "${1:?usage: sbatch --nodes N launch/slurm.sh RECIPE [section.key=value ...]}"
gpus=${GPUS_PER_NODE:-8}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --kill-on-bad-exit=1 bash -c '
  trap "" USR1
  exec .venv/bin/python -m rlpost.run.launch --config_file launch/nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * '"$gpus"'))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip '"$head"' --main_process_port 29500 -m rlpost "$@"' _ "$@"
