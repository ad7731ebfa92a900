#!/usr/bin/env bash
# What Slurm runs on the first machine of a job that slurm.sh submitted: PYTHON, then the main job's flags.
set -euo pipefail
python=$1
shift

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# A port of its own for every job, in case two share a machine.
export JAX_COORDINATOR_ADDRESS="$first:$((20000 + SLURM_JOB_ID % 20000))"
export PYTHONUNBUFFERED=1

# Slurm may signal this shell too; it must live on to see how the tasks end.
trap : TERM
code=0
srun --kill-on-bad-exit=1 "$python" -m cft_jax.main "$@" || code=$?
# 143: saved after SIGTERM, to be gone on with.
if [[ $code -eq 143 ]]; then
  echo "interrupted and saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
