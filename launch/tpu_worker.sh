#!/usr/bin/env bash
# What tpu_vm.sh has every worker of a TPU do, in the home directory: install, start FLAGS..., state, stop.
#
# The job's process is in job.pid while it runs, its exit code in job.exit afterwards, its output in job.log.
set -euo pipefail
cd "${CFT_WORKER_HOME:-$HOME}"

# After a reboot another process may have the number.
running() {
  [[ -e job.pid ]] && grep -qsz '^attend$' "/proc/$(<job.pid)/cmdline"
}

install() {
  local python=""
  if [[ -e .cft_token ]]; then
    mkdir -p .cache/huggingface
    chmod 600 .cft_token
    mv .cft_token .cache/huggingface/token
  fi
  for python in python3.13 python3.12 python3.11; do
    if command -v "$python" >/dev/null; then break; fi
  done
  if ! command -v "$python" >/dev/null; then
    sudo apt-get update -q
    sudo apt-get install -yq "$python" "$python-venv"
  fi
  [[ -x venv/bin/python ]] || "$python" -m venv venv
  venv/bin/python -m pip install -q -U pip
  venv/bin/python -m pip install -q -e "cft_jax[tpu,gcs]"
}

# Stays beside the job to note how it ends.
attend() {
  local main code=0
  cd cft_jax
  # Set before the job starts: a signal that came in between would end this process and leave the job.
  trap 'kill -TERM "$!"' TERM
  ../venv/bin/python -u -m cft_jax.main "$@" &
  main=$!
  wait "$main" || code=$?
  # A signal ends the wait before the job.
  while kill -0 "$main" 2>/dev/null; do
    code=0
    wait "$main" || code=$?
  done
  echo "$code" >../job.exit
}

start() {
  if running; then
    echo "running already"
    return
  fi
  rm -f job.exit
  nohup "${BASH_SOURCE[0]}" attend "$@" >>job.log 2>&1 </dev/null &
  echo $! >job.pid
  # Only then is it told from others, and not started twice.
  until running || ! kill -0 "$!" 2>/dev/null; do
    sleep 0.05
  done
  echo "started"
}

state() {
  if [[ -e job.exit ]]; then
    cat job.exit
  elif running; then
    echo "running"
  elif [[ -e job.pid ]]; then
    echo "lost"
  fi
}

# Gives the job two minutes to save itself.
stop() {
  local seconds
  if ! running; then
    echo "not running"
    return
  fi
  kill -TERM "$(<job.pid)"
  for ((seconds = 0; seconds < 120; seconds++)); do
    if ! running; then
      echo "stopped"
      return
    fi
    sleep 1
  done
  pkill -KILL -P "$(<job.pid)" || true
  echo "killed"
}

"$1" "${@:2}"
