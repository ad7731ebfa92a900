#!/usr/bin/env bash
# The main job on a Cloud TPU VM, one machine or a pod: made, set up, started, kept going, taken down.
#
#   launch/tpu_vm.sh COMMAND --name NAME --zone ZONE [OPTIONS] [-- FLAGS OF cft_jax.main]
#
#   create     make the TPU unless it is there; one that was preempted is made anew
#   setup      copy this checkout to all workers and install it there
#   start      start the job on all workers unless it is running
#   logs       follow the log of worker 0
#   status     say whether the TPU is there and what the job does
#   watch      create, set up and start, look after it, again after preemptions, until the job is done
#   stop       end the job on all workers; it saves itself first
#   teardown   delete the TPU
#
#   --name NAME      of the TPU
#   --zone ZONE      as in us-west4-a
#   --type TYPE      accelerator type (v5litepod-8); pods are v5litepod-16 and up
#   --version IMAGE  software of the machines; by default what Google names for the type
#   --project NAME   instead of gcloud's own
#   --spot           cheaper, may be preempted
#   --queued         wait in Google's queue (a queued resource of the same name) where there is no room at once;
#                    give it to teardown too
#   --every SECONDS  between two looks of watch (60)
#   --restarts N     how many crashes watch puts up with (3) without half an hour of work between; preemptions do not count
#   --dry-run        print the commands, do nothing
#
# On a pod --workdir must be a place that all workers see: a gs:// address. HF_TOKEN, where set, goes along as a file.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

name="" zone="" type=v5litepod-8 version="" queued=no every=60 restarts=3
project=() spot=() flags=() given=()
command=${1:-}
case $command in
  create | setup | start | logs | status | watch | stop | teardown) shift ;;
  -h | --help | "") usage "${BASH_SOURCE[0]}"; exit 0 ;;
  *) die "unknown command $command; see --help" ;;
esac
given=("$@")
while [[ $# -gt 0 ]]; do
  case $1 in
    --name) name=$(value_of "$@"); shift 2 ;;
    --zone) zone=$(value_of "$@"); shift 2 ;;
    --type) type=$(value_of "$@"); shift 2 ;;
    --version) version=$(value_of "$@"); shift 2 ;;
    --project) project=(--project "$(value_of "$@")"); shift 2 ;;
    --every) every=$(value_of "$@"); shift 2 ;;
    --restarts) restarts=$(value_of "$@"); shift 2 ;;
    --spot) spot=(--spot); shift ;;
    --queued) queued=yes; shift ;;
    --dry-run) dry_run=yes; shift ;;
    -h | --help) usage "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; flags=("$@"); break ;;
    *) die "unknown option $1; the job's own flags come after --; see --help" ;;
  esac
done
[[ -n $name && -n $zone ]] || die "--name and --zone are needed; see --help"
[[ $restarts =~ ^[0-9]+$ && $every =~ ^[0-9]+$ ]] || die "--every and --restarts take whole numbers"
if [[ $command == start || $command == watch ]]; then
  [[ ${#flags[@]} -gt 0 ]] || die "nothing to run; give the job's flags after --, as in -- --config=configs/qwen3.py"
fi
need gcloud

# https://cloud.google.com/tpu/docs/runtimes
if [[ -z $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

tpu() {
  gcloud compute tpus tpu-vm "$1" "${@:2}" --zone "$zone" "${project[@]}"
}

change() {
  run gcloud compute tpus tpu-vm "$1" "${@:2}" --zone "$zone" "${project[@]}"
}

# READY, PREEMPTED, ...; empty where there is no such TPU. A failing gcloud for another reason ends the script.
state() {
  local answer
  [[ $dry_run == no ]] || return 0
  if answer=$(tpu describe "$name" --format 'value(state)' 2>&1); then
    printf '%s' "$answer"
  elif [[ $answer != *NOT_FOUND* && $answer != *"not found"* ]]; then
    die "gcloud: $answer"
  fi
}

# The same of the request in the queue: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, ...
queue() {
  local answer
  if answer=$(gcloud compute tpus queued-resources describe "$name" --format 'value(state.state)' \
    --zone "$zone" "${project[@]}" 2>&1); then
    printf '%s' "$answer"
  elif [[ $answer != *NOT_FOUND* && $answer != *"not found"* ]]; then
    die "gcloud: $answer"
  fi
}

change_queue() {
  run gcloud compute tpus queued-resources "$1" "$name" "${@:2}" --zone "$zone" "${project[@]}"
}

enqueue() {
  change_queue create --node-id "$name" --accelerator-type "$type" --runtime-version "$version" "${spot[@]}"
}

# Asks for the TPU and waits until it is there; a request whose TPU was preempted is SUSPENDED for good.
create_queued() {
  local now asked=no
  if [[ $dry_run == yes ]]; then
    enqueue
    return
  fi
  while true; do
    now=$(queue)
    case $now in
      ACTIVE)
        if [[ $(state) == READY ]]; then
          say "$name is READY"
          return
        fi
        ;;
      FAILED | SUSPENDED)
        [[ $asked == no ]] || die "the request for $name ended as $now; ask gcloud compute tpus queued-resources describe"
        change_queue delete --force --quiet
        enqueue
        asked=yes
        ;;
      "")
        [[ $asked == yes ]] || enqueue
        asked=yes
        ;;
    esac
    say "$name: the request is ${now:-made}; looking again in $every s"
    sleep "$every"
  done
}

create() {
  local now
  if [[ $queued == yes ]]; then
    create_queued
    return
  fi
  now=$(state)
  case $now in
    READY | CREATING | STARTING | RESTARTING | REPAIRING) say "$name is $now" ; return ;;
    "") ;;
    *) say "$name is $now; making it anew"; change delete "$name" --quiet ;;
  esac
  change create "$name" --accelerator-type "$type" --version "$version" "${spot[@]}"
}

# Something that tpu_worker.sh knows, on one worker or on all.
workers() {
  local which=$1
  shift
  change ssh "$name" --worker="$which" --command "bash cft_jax/launch/tpu_worker.sh $(quoted "$@")"
}

setup() {
  local scratch
  scratch=$(mktemp -d)
  # shellcheck disable=SC2064 # the directory of now
  trap "rm -rf '$scratch'" EXIT
  run tar -czf "$scratch/cft_jax.tar.gz" -C "$root" --exclude=__pycache__ \
    setup.py pyproject.toml README.md LICENSE cft_jax configs launch
  change scp "$scratch/cft_jax.tar.gz" "$name:cft_jax.tar.gz" --worker=all
  if [[ -n ${HF_TOKEN:-} ]]; then
    # As a file: a command line could be read by others on the machine.
    (umask 077 && printf '%s' "$HF_TOKEN" >"$scratch/token")
    change scp "$scratch/token" "$name:.cft_token" --worker=all
  fi
  change ssh "$name" --worker=all --command 'mkdir -p cft_jax && tar -xzf cft_jax.tar.gz -C cft_jax'
  workers all install
}

# What the job on worker 0 does: running, its exit code, or lost; empty where it was never started or nobody answers.
job() {
  tpu ssh "$name" --worker=0 --command 'bash cft_jax/launch/tpu_worker.sh state' 2>/dev/null | tail -n 1 || true
}

# A command of this script with the same options, in a process of its own, which may fail.
this() {
  "${BASH_SOURCE[0]}" "$1" "${given[@]}"
}

bring_up() {
  this create && this setup && this start
}

watch() {
  local now code crashes=0 steady=0
  bring_up
  [[ $dry_run == no ]] || return 0
  while sleep "$every"; do
    # What fails here is tried again at the next look: no capacity, no network.
    now=$(state) || continue
    if [[ $now != READY ]]; then
      say "$name is ${now:-gone}; starting again"
      bring_up || say "that failed; the next attempt is in $every s"
      continue
    fi
    code=$(job)
    case $code in
      running)
        # A job that crashes every few minutes is not to be restarted for ever.
        steady=$((steady + 1))
        [[ $((steady * every)) -lt 1800 ]] || crashes=0
        ;;
      "") ;;
      0) say "the job is done"; return 0 ;;
      2) die "the job found a mistake in what it was asked to do: launch/tpu_vm.sh logs --name $name --zone $zone" ;;
      *)
        # 143 was saved after a signal, 75 is a worker that came too late, lost went with a reboot.
        [[ $code == 143 || $code == 75 || $code == lost ]] || crashes=$((crashes + 1))
        steady=0
        [[ $crashes -le $restarts ]] || die "the job ended with $code after $restarts restarts; see its log"
        say "the job ended with $code; starting it again"
        { this stop && this start; } || say "that failed; the next attempt is in $every s"
        ;;
    esac
  done
}

case $command in
  create) create ;;
  setup) setup ;;
  start) workers all start "${flags[@]}" ;;
  logs) change ssh "$name" --worker=0 --command 'tail -n 100 -F job.log' ;;
  status)
    now=$(state)
    say "$name: ${now:-absent}"
    if [[ $now == READY ]]; then
      code=$(job)
      say "job: ${code:-not started}"
    fi
    ;;
  watch) watch ;;
  stop) workers all stop ;;
  teardown)
    now=$(state)
    if [[ $queued == yes ]]; then
      [[ $dry_run == yes ]] || now=$(queue)
    fi
    if [[ $dry_run == no && -z $now ]]; then
      say "$name is not there"
    elif [[ $queued == yes ]]; then
      change_queue delete --force --quiet
    else
      change delete "$name" --quiet
    fi
    ;;
esac
