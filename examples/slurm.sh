#!/usr/bin/env bash
# Train with autoseg under SLURM, also where jobs are pre-empted or end before the training does.
#
#   sbatch examples/slurm.sh WORK [options of autoseg train]
#
# Two minutes before the time is up, and when the job is pre-empted, SLURM sends SIGTERM. autoseg saves its state after the step
# at work and ends with an error code; the job then goes back into the queue, and the same command goes on where it stopped. With
# several GPUs in the job, folds train side by side, one on each.
#
#SBATCH --job-name=autoseg
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=autoseg-%j.log

set -u
[ $# -ge 1 ] || { echo "usage: sbatch $0 WORK [options of autoseg train]" >&2; exit 2; }

# One fold on all GPUs of the job instead of one fold on each (with --gres=gpu:4 above):
#   command=(torchrun --standalone --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" -m autoseg.cli train "$@")
# One fold on all GPUs of several machines that share WORK (with --nodes=2 --ntasks-per-node=4 --gres=gpu:4 above); SLURM tells
# each task its number, and without --kill-on-bad-exit the other tasks would wait for one that failed:
#   export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
#   command=(srun --kill-on-bad-exit=1 autoseg train "$@")
command=(autoseg train "$@")

# In the background, since bash runs a trap only between commands; the signal comes to this script alone (B:) and is passed on once
"${command[@]}" &
child=$!
stopped=0
trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM INT
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do  # a signal ended the wait, not the training: let it save
  wait "$child"
  code=$?
done

# autoseg and srun end with 143 then, torchrun with 1
if { [ "$code" -eq 143 ] || { [ "$stopped" -eq 1 ] && [ "$code" -ne 0 ]; }; } && [ -n "${SLURM_JOB_ID:-}" ]; then
  echo "stopped by a signal after its state was saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
