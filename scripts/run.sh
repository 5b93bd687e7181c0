#!/usr/bin/env bash
# One prompt file under one configuration: metrics.json, responses.jsonl and config.yaml in the folder, the record beside.
#
#   ./scripts/run.sh data/benchmark.jsonl sweeps_config/models/qwen2_7b_ngram.yaml results/my_experiment [FLAGS]
#   PROFILE=embedded ./scripts/run.sh ...    the embedded pair instead of the configuration's models
set -euo pipefail
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
source "$root/scripts/lib.sh"
(($# >= 3)) || die "expected BENCHMARK CONFIG OUTPUT_DIR"
here=$PWD
cd "$root"
./scripts/bootstrap.sh </dev/null
enter_env
cd "$here" # the arguments are the caller's paths
exec nwor bench --benchmark "$1" --config "$2" --output-dir "$3" "${@:4}"
