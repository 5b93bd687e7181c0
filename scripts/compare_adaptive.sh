#!/usr/bin/env bash
# What adaptive draft lengths changed, pair by pair: the plain percentage, then the interval that says what it is worth.
#
#   ./scripts/compare_adaptive.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
enter_env
need jq
need bc

folder=${1:-sweeps/adaptive_grid}
shopt -s nullglob
files=("$folder"/run*_adaptive0.json)
((${#files[@]})) || die "$folder holds no run*_adaptive0.json; run ./run_adaptive_grid.sh first"

for off in "${files[@]}"; do
    on=${off/_adaptive0/_adaptive1}
    name=$(basename "$off" _adaptive0.json)
    # jq 1.6 ends with 0 on an empty file.
    [[ -s $off && -s $on ]] || { echo "$name: incomplete" && continue; }
    off_s=$(jq -r '.summary.per_mode[0].latency_avg_s' "$off")
    on_s=$(jq -r '.summary.per_mode[0].latency_avg_s' "$on")
    [[ $off_s != null && $on_s != null ]] || { echo "$name: failed run" && continue; }
    echo "$name: $(echo "scale=2; ($off_s - $on_s) * 100 / $off_s" | bc)% improvement"
done
echo
nwor compare "$folder"
