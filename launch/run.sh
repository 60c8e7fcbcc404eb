#!/usr/bin/env bash
# accelerate launch, as it should end:
#
#   launch/run.sh launch/cpu.yaml [--num_processes 4] RECIPE [section.key=value ...]
#
# By itself accelerate dies of Ctrl-C at once, with a traceback, while the run it started is still saving; and below whatever a
# run says of its error it puts a traceback of its own, and ends with 1. Here it takes no notice of Ctrl-C: the run does, saves,
# says how to go on, and this command ends when it has ended, with the run's own last words and exit code.
set -eu
trap '' INT
export RLPOST_COMMAND="$0 $1" # what to print where the run says how to go on
config=$1
shift
options=()
while [ "${1#--}" != "${1:-}" ]; do
  export RLPOST_COMMAND="$RLPOST_COMMAND $1"
  options+=("$1")
  shift
  case "${options[-1]}" in *=*) ;; *) RLPOST_COMMAND="$RLPOST_COMMAND $1" options+=("$1") && shift ;; esac
done
exec "${RLPOST_VENV:-.venv}/bin/python" -m rlpost.run.launch --config_file "$config" ${options[@]+"${options[@]}"} -m rlpost "$@"
