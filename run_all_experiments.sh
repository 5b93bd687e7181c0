#!/usr/bin/env bash
# The three grids in order: 27 runs. Sets the machine up first if it is fresh, goes on after a failure, resumes.
#
#   TARGET_MODEL=... DRAFT_MODEL=... TENSOR_PARALLEL_SIZE=... PROFILE=embedded|quick|full NUM_SEEDS=... ONLY=... ./run_all_experiments.sh
#   ./run_all_experiments.sh --dry-run    what would run, and why
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/lib.sh
[[ $# -eq 0 || "$*" == --dry-run ]] || die "unknown argument '$*'; expected --dry-run or nothing"

./scripts/bootstrap.sh </dev/null
enter_env
need jq
need bc
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING}

mkdir -p sweeps
exec 7> >(tee -a sweeps/master_experiment.log)
tee=$! failed=() child=
# In the background and waited for: bash runs a trap only between foreground commands.
trap '[[ -z $child ]] || { kill -TERM "$child" 2>/dev/null; wait "$child" || :; }; exit 130' INT TERM
for grid in adaptive_grid early_exit_grid oneoff_scenarios; do
    say "== $grid"
    "./run_$grid.sh" "$@" >&7 2>&1 </dev/null 7>&- &
    child=$!
    wait "$child" || failed+=("$grid")
    child=
done
exec 7>&-
wait "$tee" # so that the log is whole, and on the screen, before the last word
# Of what there is, also where not all of it is.
[[ $# -gt 0 ]] || nwor report sweeps || failed+=(report)
((${#failed[@]} == 0)) || die "not complete: ${failed[*]}; what failed is tried again by the next call"
