#!/usr/bin/env bash
# accelerate launch, as it should end at Ctrl-C:
#
#   launch/run.sh launch/cpu.yaml RECIPE [section.key=value ...]
#
# By itself accelerate dies of Ctrl-C at once, with a traceback, while the run it started is still saving. Here it takes no
# notice of Ctrl-C: the run does, saves, says how to go on, and this command ends when it has ended.
set -eu
trap '' INT
config=$1
shift
exec "${RLPOST_VENV:-.venv}/bin/accelerate" launch --quiet --config_file "$config" -m rlpost "$@"
