#!/usr/bin/env bash
# Grid 1: 16 runs, a moving draft length against a fixed one. Resumes; see docs/experiments.md.
#
#   TARGET_MODEL=... DRAFT_MODEL=... TENSOR_PARALLEL_SIZE=... PROFILE=embedded|quick|full NUM_SEEDS=... ONLY=... ./run_adaptive_grid.sh
#   ./run_adaptive_grid.sh --dry-run    what would run, and why
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/lib.sh

./scripts/bootstrap.sh </dev/null
enter_env
case "${1:-}" in
    --dry-run) exec nwor plan sweeps_config/adaptive_grid.yaml ;;
    '') run_grid sweeps_config/adaptive_grid.yaml sweeps/adaptive_grid ;;
    *) die "unknown argument '$1'; expected --dry-run or nothing" ;;
esac
