#!/usr/bin/env bash
# K/V bytes without and with early exit: measured DRAM writes where Nsight Compute ran, logical bytes everywhere.
#
#   ./scripts/compare_bandwidth.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
enter_env
need jq

folder=${1:-sweeps/early_exit_grid}
baseline=$folder/run1_r36_t128_temp0.0_thresh0.0.json
threshold=$folder/run3_r36_t128_temp0.0_thresh0.5.json
[[ -s $baseline && -s $threshold ]] || die "$folder lacks runs 1 and 3; run ./run_early_exit_grid.sh first"

for file in "$baseline" "$threshold"; do
    jq -r '.summary.per_mode[0] as $m | "threshold \($m.threshold):",
        "  DRAM writes     \($m.ncu_metrics."dram__bytes_write.sum" // "unknown: \($m.ncu.reason)")",
        "  logical bytes   \($m.target_kv_bytes_written) target, \($m.draft_kv_bytes_written) draft",
        "  tokens stopped  \($m.tokens_stopped_by_confidence)"' "$file"
done
nwor compare "$baseline" "$threshold"
