#!/usr/bin/env bash
# Four deployments: code completion, chatbot, high throughput (Nsight Compute), creative writing. Resumes; see docs/experiments.md.
#
#   TARGET_MODEL=... DRAFT_MODEL=... TENSOR_PARALLEL_SIZE=... PROFILE=embedded|quick|full NUM_SEEDS=... ONLY=... ./run_oneoff_scenarios.sh
#   ./run_oneoff_scenarios.sh --dry-run    what would run, and why
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/lib.sh

./scripts/bootstrap.sh </dev/null
enter_env
case "${1:-}" in
    --dry-run) exec nwor plan sweeps_config/oneoff_scenarios.yaml ;;
    '') run_grid sweeps_config/oneoff_scenarios.yaml sweeps/oneoff_scenarios ;;
    *) die "unknown argument '$1'; expected --dry-run or nothing" ;;
esac
