# shellcheck shell=bash
# What the launchers share; sourced by them.

dry_run=no

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() {
  printf '%s\n' "$*" >&2
}

# Words as a shell would read them back.
quoted() {
  local word text=""
  for word in "$@"; do
    printf -v word '%q' "$word"
    text+="${text:+ }$word"
  done
  printf '%s' "$text"
}

# Runs a command that changes something; with --dry-run prints it instead.
run() {
  if [[ $dry_run == yes ]]; then
    printf '+ %s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# Refuses to start without a program.
need() {
  [[ $dry_run == yes ]] || command -v "$1" >/dev/null || die "$1 is not installed; see launch/README.md"
}

# The usage text of a script: the comment at its top.
usage() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"
}

# The value of an option, or a mistake if the command line ends there.
value_of() {
  [[ $# -ge 2 && -n $2 ]] || die "$1 takes a value; see --help"
  printf '%s' "$2"
}
