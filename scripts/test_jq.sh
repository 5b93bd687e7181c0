#!/usr/bin/env bash
# The tests that read records with jq, once under jq 1.6 and once under 1.7 (Debian's own, unpacked below build/jq).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
./scripts/bootstrap.sh </dev/null
enter_env
need apt-get
need dpkg-deb

# A release of its own, libraries and all, so that nothing of this machine's is touched.
fetch() {
    local release=$1 root=$PWD/build/jq/$1 libs
    mkdir -p "$root/lists/partial" "$root/archives/partial" "$root/debs" "$root/bin"
    echo "deb http://deb.debian.org/debian $release main" >"$root/sources.list"
    local apt=(apt-get -qq -o "Dir::Etc::sourcelist=$root/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$root/lists" -o "Dir::Cache=$root" -o APT::Sandbox::User=root -o Acquire::Languages=none)
    "${apt[@]}" update
    (cd "$root/debs" && "${apt[@]}" download jq libjq1 libonig5 libc6)
    local deb
    for deb in "$root"/debs/*.deb; do dpkg-deb -x "$deb" "$root"; done
    libs=$(dirname "$(find "$root" -name 'libjq.so.1' | head -1)")
    # glibc's own loader: the release's libc may be newer than the machine's.
    local libc
    libc=$(dirname "$(find "$root" -name 'libc.so.6' | head -1)")
    printf '#!/bin/sh\nLD_PRELOAD= exec "%s" --library-path "%s:%s" "%s" "$@"\n' \
        "$(find "$root" -name 'ld-linux-x86-64.so.2' | head -1)" "$libs" "$libc" "$root/usr/bin/jq" >"$root/bin/jq"
    chmod +x "$root/bin/jq"
}

for release in bookworm trixie; do
    [[ -x build/jq/$release/bin/jq ]] || fetch "$release"
    say "$("build/jq/$release/bin/jq" --version)"
    PATH="$PWD/build/jq/$release/bin:$PATH" pytest -q tests/bench/test_record.py tests/bench/test_compare.py \
        -k "jq or verbatim or ncu_paths"
done
