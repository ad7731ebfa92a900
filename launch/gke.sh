#!/usr/bin/env bash
# The main job on Kubernetes (GKE): one pod per machine of TPUs or GPUs, restarted until it is done.
#
#   launch/gke.sh COMMAND --name NAME [OPTIONS] [-- FLAGS OF cft_jax.main]
#
#   manifest   print the manifest
#   start      apply it, unless a job of that name is there
#   logs       follow the log of the first pod
#   status     show the job and its pods
#   stop       delete the job; it saves itself first
#
#   --name NAME          of the job: small letters, digits, dashes
#   --image IMAGE        built from launch/Dockerfile and pushed
#   --machines N         pods (1)
#   --tpu TYPE/TOPOLOGY/CHIPS  as in tpu-v5-lite-podslice/4x4/4: node selector, topology, chips of one machine
#   --gpu TYPE/COUNT     as in nvidia-h100-80gb/8: node selector and GPUs of one machine; without --tpu and --gpu: CPUs
#   --secret NAME        Kubernetes secret with a key HF_TOKEN, for gated models
#   --service-account N  with access to the bucket of the workdir
#   --namespace NAME     (default)
#   --dry-run            print the commands, do nothing
#
# The pods share no disk: --workdir must be a gs:// address. Exit code 2, a mistake in the flags, is not tried again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

name="" image="" machines=1 tpu="" gpu="" secret="" account="" namespace=default
flags=()
command=${1:-}
case $command in
  manifest | start | logs | status | stop) shift ;;
  -h | --help | "") usage "${BASH_SOURCE[0]}"; exit 0 ;;
  *) die "unknown command $command; see --help" ;;
esac
while [[ $# -gt 0 ]]; do
  case $1 in
    --name) name=$(value_of "$@"); shift 2 ;;
    --image) image=$(value_of "$@"); shift 2 ;;
    --machines) machines=$(value_of "$@"); shift 2 ;;
    --tpu) tpu=$(value_of "$@"); shift 2 ;;
    --gpu) gpu=$(value_of "$@"); shift 2 ;;
    --secret) secret=$(value_of "$@"); shift 2 ;;
    --service-account) account=$(value_of "$@"); shift 2 ;;
    --namespace) namespace=$(value_of "$@"); shift 2 ;;
    --dry-run) dry_run=yes; shift ;;
    -h | --help) usage "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; flags=("$@"); break ;;
    *) die "unknown option $1; the job's own flags come after --; see --help" ;;
  esac
done

label='^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$'
[[ $name =~ $label ]] || die "--name '$name' must be small letters, digits and dashes; see --help"
[[ $namespace =~ $label ]] || die "--namespace '$namespace' must be small letters, digits and dashes"
[[ -z $secret || $secret =~ $label ]] || die "--secret '$secret' must be small letters, digits and dashes"
[[ -z $account || $account =~ $label ]] || die "--service-account '$account' must be small letters, digits and dashes"
[[ $machines =~ ^[1-9][0-9]*$ ]] || die "--machines '$machines' must be a whole number from 1"
[[ -z $tpu || $tpu =~ ^[a-z0-9-]+/[0-9x]+/[0-9]+$ ]] || die "--tpu '$tpu' must be TYPE/TOPOLOGY/CHIPS; see --help"
[[ -z $gpu || $gpu =~ ^[a-z0-9-]+/[0-9]+$ ]] || die "--gpu '$gpu' must be TYPE/COUNT; see --help"
[[ -z $tpu || -z $gpu ]] || die "--tpu and --gpu exclude each other"

# A string as JSON, and so YAML, has it.
json() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\t'/\\t}
  printf '"%s"' "${text//$'\n'/\\n}"
}

arguments() {
  local flag joined=""
  for flag in "${flags[@]}"; do
    joined+="${joined:+, }$(json "$flag")"
  done
  printf '[%s]' "$joined"
}

selector() {
  local kind topology
  if [[ -n $tpu ]]; then
    IFS=/ read -r kind topology _ <<<"$tpu"
    printf '      nodeSelector:\n'
    printf '        cloud.google.com/gke-tpu-accelerator: %s\n' "$(json "$kind")"
    printf '        cloud.google.com/gke-tpu-topology: %s\n' "$(json "$topology")"
  elif [[ -n $gpu ]]; then
    printf '      nodeSelector:\n        cloud.google.com/gke-accelerator: %s\n' "$(json "${gpu%%/*}")"
  fi
}

resources() {
  if [[ -n $tpu ]]; then
    printf '          resources: {limits: {google.com/tpu: %s}}\n' "${tpu##*/}"
  elif [[ -n $gpu ]]; then
    printf '          resources: {limits: {nvidia.com/gpu: %s}}\n' "${gpu##*/}"
  fi
}

# Several machines of CPUs or GPUs find each other by these; on TPUs GKE sets variables of its own.
variables() {
  printf '          env:\n            - {name: PYTHONUNBUFFERED, value: "1"}\n'
  if [[ $machines -gt 1 && -z $tpu ]]; then
    printf '            - {name: JAX_COORDINATOR_ADDRESS, value: "%s-0.%s:8476"}\n' "$name" "$name"
    printf '            - {name: JAX_NUM_PROCESSES, value: "%s"}\n' "$machines"
  fi
  if [[ -n $secret ]]; then
    printf '            - {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: %s, key: HF_TOKEN}}}\n' "$secret"
  fi
}

manifest() {
  cat <<YAML
apiVersion: v1
kind: Service
metadata: {name: $name, namespace: $namespace}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector: {job-name: $name}
---
apiVersion: batch/v1
kind: Job
metadata: {name: $name, namespace: $namespace}
spec:
  completionMode: Indexed
  completions: $machines
  parallelism: $machines
  backoffLimit: $((10 * machines))
  podFailurePolicy:
    rules:
      - {action: FailJob, onExitCodes: {operator: In, values: [2]}}
      - {action: Ignore, onExitCodes: {operator: In, values: [75, 143]}}
      - {action: Ignore, onPodConditions: [{type: DisruptionTarget}]}
  template:
    spec:
      subdomain: $name
      restartPolicy: Never
      terminationGracePeriodSeconds: 300
${account:+      serviceAccountName: $account
}$(selector)
      containers:
        - name: main
          image: $(json "$image")
          args: $(arguments)
$(variables)
$(resources)
YAML
}

need_flags() {
  [[ -n $image ]] || die "--image is needed; launch/README.md says how to build one"
  [[ ${#flags[@]} -gt 0 ]] || die "nothing to run; give the job's flags after --, as in -- --config=configs/qwen3.py"
}

cluster() {
  run kubectl --namespace "$namespace" "$@"
}

case $command in
  manifest)
    need_flags
    manifest
    ;;
  start)
    need_flags
    need kubectl
    if [[ $dry_run == no ]] && kubectl --namespace "$namespace" get job "$name" >/dev/null 2>&1; then
      say "a job named $name is there already; launch/gke.sh stop --name $name deletes it"
    elif [[ $dry_run == yes ]]; then
      cluster apply -f -
      manifest
    else
      manifest | cluster apply -f -
    fi
    ;;
  logs) need kubectl; cluster logs --follow --selector "job-name=$name,batch.kubernetes.io/job-completion-index=0" ;;
  status)
    need kubectl
    cluster get job "$name"
    cluster get pods --selector "job-name=$name"
    ;;
  stop) need kubectl; cluster delete job,service "$name" --ignore-not-found ;;
esac
