# shellcheck shell=bash
# What every script of this project shares: logging, the environment's Python, pip's failures in one line. Source it
# with `set -euo pipefail` on and the current directory at the repository's root.

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

need() {
    command -v "$1" >/dev/null || die "$1 is missing; install it with: sudo apt-get install $1"
}

# Where the environment is. NWOR_ENV=current means the one that is active.
env_python() {
    if [[ ${NWOR_ENV:-} == current ]]; then
        command -v python3 || die "NWOR_ENV=current, and there is no python3 on PATH"
    else
        printf '%s\n' "$PWD/.venv/bin/python"
    fi
}

# Programs find their own tools first, never this directory's packages (kernels/ would shadow a PyPI package), and on a
# CPU the OpenMP runtime without which speculation is up to ten times slower.
enter_env() {
    local prefix
    prefix=$("$(env_python)" -c 'import sys; print(sys.prefix)')
    # Before Python starts: a hash seed set later does not count.
    export PATH="$prefix/bin:$PATH" PYTHONSAFEPATH=1 PYTHONHASHSEED="${PYTHONHASHSEED:-0}"
    local openmp=$prefix/lib/libiomp5.so
    if [[ -f $openmp && ${LD_PRELOAD:-} != *libiomp5* ]]; then
        export LD_PRELOAD="$openmp${LD_PRELOAD:+:$LD_PRELOAD}"
    fi
}

# pip_install PYTHON LOG ARGS...: quiet, and one line that says what to do where it fails.
pip_install() {
    local python=$1 log=$2
    shift 2
    "$python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1 && return
    die "$(pip_reason "$log")"
}

pip_reason() {
    local log=$1 offline='Temporary failure in name resolution|Name or service not known|NewConnectionError'
    offline+='|ConnectTimeout|Connection refused|Network is unreachable|ProxyError|Max retries exceeded'
    if grep -qE 'No space left on device|Disk quota exceeded' "$log"; then
        echo "no space left for $PWD/.venv; free some and run this again"
    elif grep -qE "$offline" "$log"; then
        echo "no package index can be reached; check the network or pip's index settings, and run this again ($log)"
    else
        echo "pip failed: $(grep -E '^ERROR' "$log" | tail -1 | cut -c1-200) (all of it: $log)"
    fi
}

# CPU builds of torch (`+cpu`) are not on PyPI: pip's own configuration first, then PyTorch's public index.
with_torch_index() {
    local python=$1 log=$2
    shift 2
    "$python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1 && return
    grep -qE 'No space left on device' "$log" && die "$(pip_reason "$log")"
    pip_install "$python" "$log" --extra-index-url https://download.pytorch.org/whl/cpu "$@"
}

# run_grid CONFIG OUT: every engine group that lacks a run, each in a process of its own, logged to OUT/experiment.log.
# Goes on after a failure; ends non-zero and names what is not done. One invocation a grid at a time.
run_grid() {
    local config=$1 out=$2 group groups status=0 child=
    local log=$out/experiment.log rows=$out/.plan.tsv
    mkdir -p "$out"
    exec 8>>"$out/.grid.lock"
    flock -n 8 || die "$out is being worked on by another invocation; wait for it to end"
    nwor plan "$config" --out "$out" --tsv >"$rows"
    groups=$(awk -F'\t' '$2 == "pending" && !seen[$1]++ { print $1 }' "$rows")
    # In the background and waited for: bash runs a trap only between foreground commands.
    trap '[[ -z $child ]] || { kill -TERM "$child" 2>/dev/null; wait "$child" || :; }; exit 130' INT TERM
    while IFS= read -r group; do
        [[ -n $group ]] || continue
        nwor bench "$config" --out "$out" --group "$group" > >(tee -a "$log") 2>&1 &
        child=$!
        wait "$child" || status=1
        child=
    done <<<"$groups"
    # A plan costs a third of a second: where nothing ran, it is known already.
    [[ -z $groups ]] || nwor plan "$config" --out "$out" --tsv >"$rows"
    awk -F'\t' '{ n[$2]++; if ($2 != "done") print "not done: " $3 " (" $4 ")" }
        END { printf "%d of %d runs done\n", n["done"], NR; exit n["done"] != NR }' "$rows" | tee -a "$log" ||
        status=1
    trap - INT TERM
    exec 8>&-
    return "$status"
}
