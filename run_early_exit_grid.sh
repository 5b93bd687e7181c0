#!/usr/bin/env bash
# Grid 2: 7 runs, drafts that stop when unsure, under Nsight Compute where there is one. Resumes; see docs/experiments.md.
#
#   TARGET_MODEL=... DRAFT_MODEL=... TENSOR_PARALLEL_SIZE=... PROFILE=embedded|quick|full NUM_SEEDS=... ONLY=... ./run_early_exit_grid.sh
#   ./run_early_exit_grid.sh --dry-run    what would run, and why
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/lib.sh

./scripts/bootstrap.sh </dev/null
enter_env
case "${1:-}" in
    --dry-run) exec nwor plan sweeps_config/early_exit_grid.yaml ;;
    '') run_grid sweeps_config/early_exit_grid.yaml sweeps/early_exit_grid ;;
    *) die "unknown argument '$1'; expected --dry-run or nothing" ;;
esac
