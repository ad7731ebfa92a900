#!/usr/bin/env bash
# Submits the main job to Slurm: several machines with GPUs, one task per GPU, requeued until it is done.
#
#   launch/slurm.sh [OPTIONS] -- --config=configs/llama.py:3b --workdir=/shared/runs/llama-3b
#
# What follows -- goes to `python -m cft_jax.main`. The workdir must lie where all machines see it.
#
#   --nodes N         machines (1)
#   --gpus N          GPUs of each (8); 0 runs one task per machine on its CPUs
#   --name NAME       name of the job (cft); a second job of the same name is not submitted
#   --time D-HH:MM    limit of one stretch (1-00:00); the run is saved and requeued when it ends
#   --partition NAME  and --account NAME, --constraint NAME: as in sbatch
#   --python FILE     interpreter with cft_jax installed (python)
#   --dry-run         print the command, do nothing
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

nodes=1 gpus=8 name=cft time=1-00:00 python=python
more=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --nodes) nodes=$(value_of "$@"); shift 2 ;;
    --gpus) gpus=$(value_of "$@"); shift 2 ;;
    --name) name=$(value_of "$@"); shift 2 ;;
    --time) time=$(value_of "$@"); shift 2 ;;
    --python) python=$(value_of "$@"); shift 2 ;;
    --partition | --account | --constraint) more+=("$1=$(value_of "$@")"); shift 2 ;;
    --dry-run) dry_run=yes; shift ;;
    -h | --help) usage "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option $1; the job's own flags come after --; see --help" ;;
  esac
done
[[ $# -gt 0 ]] || die "nothing to run; give the job's flags after --, as in -- --config=configs/demo.py"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes $nodes must be a whole number from 1"
[[ $gpus =~ ^[0-9]+$ ]] || die "--gpus $gpus must be a whole number"
need sbatch

if [[ $dry_run == no ]] && squeue --noheader --me --name="$name" --format=%i | grep -q .; then
  say "a job named $name is queued or running already; scancel --me --name=$name ends it"
  exit 0
fi

tasks=$((gpus > 0 ? gpus : 1))
[[ $gpus -eq 0 ]] || more+=("--gpus-per-node=$gpus")
# SIGTERM five minutes before the limit lets the run save itself; slurm_job.sh then puts it back into the queue.
run sbatch \
  --job-name="$name" \
  --nodes="$nodes" \
  --ntasks-per-node="$tasks" \
  --time="$time" \
  --signal=TERM@300 \
  --requeue \
  --open-mode=append \
  --output="$name-%j.log" \
  --chdir="$root" \
  "${more[@]}" \
  "$root/launch/slurm_job.sh" "$python" "$@"
