#!/usr/bin/env bash
# Several machines under SLURM, started again after a preemption:
#   sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sh recipes/finetune_full.toml [table.key=value ...]
# PROFILE=launch/fsdp2.yaml sbatch ... takes another profile. run.output_dir must be on a shared file system.
# Its name in the queue:
#SBATCH --job-name=llava-accel
# One launcher a machine; it starts a process for each GPU:
#SBATCH --ntasks-per-node=1
# For the launcher, its processes, and their data.workers:
#SBATCH --cpus-per-task=32
# Time limit of one start:
#SBATCH --time=24:00:00
# The job may be queued again, by SLURM and by the last lines of this script:
#SBATCH --requeue
# One log over all starts:
#SBATCH --open-mode=append
# Two minutes before the time is up, to this script alone: see `end`:
#SBATCH --signal=B:USR1@120
set -euo pipefail

profile=${PROFILE:-launch/multinode_zero3.yaml}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=${hosts%%$'\n'*} # the first; `| head` would break the pipe, which ends this script
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one machine must not meet each other
gpus=${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}

# The contract with the training: SIGTERM makes every rank finish its step, write a checkpoint within 30 seconds, the
# time that the launcher leaves its processes, and end with code 75 (EX_TEMPFAIL: start the same command again). What is
# started again takes up the newest complete checkpoint (run.resume = "auto"). The launcher turns any code into 1, so this
# script remembers that it asked for the end: then the job is queued again, and after an error of its own it is not.
asked_to_end=false
end() {
  asked_to_end=true
  scancel --signal=TERM "$SLURM_JOB_ID.0" || true
}
trap end USR1 TERM

# `$SLURM_NODEID` is each machine's own, so it must not be expanded here.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file "$0" --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$1" --main_process_ip "$2" --main_process_port "$3" -m llava_accel.train "${@:4}"
' "$profile" "$((SLURM_NNODES * gpus))" "$host" "$port" "$@" &

status=0
wait $! || status=$?
if $asked_to_end; then
  wait || true # the first `wait` ended with the signal, the training may still be saving
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
