#!/usr/bin/env bash
#
# Builds a real `llama-server` (llama.cpp, CPU only) for the tests that put a real engine behind the host.
#
#   usage: build-llama-server.sh DEST_DIR [JOBS]
#
# Writes DEST_DIR/llama-server (one binary of about 13 MB) and DEST_DIR/venv (its Python also runs
# make-tiny-model.py). Touches nothing outside DEST_DIR. A second call with the binary in place exits at once; a call
# after an interrupted build goes on where that one stopped. KEEP_BUILD=1 keeps the source and the objects.
#
# Why from an sdist: the Python binding's source archive carries the whole llama.cpp tree, server included, so that
# a package index is all the network this needs, and one version number and one hash pin all of it.
set -euo pipefail

SDIST_VERSION=0.3.36
SDIST_SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e

die() {
  printf 'build-llama-server: %s\n' "$*" >&2
  exit 1
}
say() { printf 'build-llama-server: %s\n' "$*" >&2; }

[[ $# -ge 1 && $# -le 2 ]] || die "usage: $0 DEST_DIR [JOBS]"
jobs=${2:-$(nproc 2>/dev/null || echo 2)}
[[ $jobs =~ ^[1-9][0-9]*$ ]] || die "JOBS is '$jobs'; it must be a positive number"

mkdir -p -- "$1" 2>/dev/null || die "cannot create $1; choose a DEST_DIR that this user may write"
dest=$(cd -- "$1" && pwd)

# `--version` is run, not just looked for: a binary copied from another architecture or cut short fails here. So does an
# environment whose Python was upgraded away.
works() { [[ -x $1 ]] && "$1" --version >/dev/null 2>&1; }
environment_works() { "$dest/venv/bin/python" -c 'import gguf, numpy' 2>/dev/null; }

if works "$dest/llama-server" && environment_works; then
  say "$dest/llama-server is already there and works"
  exit 0
fi

# Two builds in one folder would trample each other's objects; the second waits, then finds the work done.
if command -v flock >/dev/null; then
  exec 9>"$dest/.lock"
  flock -n 9 || {
    say "another build is at work in $dest; waiting for it"
    flock 9
  }
fi

# Every missing thing is named at once, with the package that brings it (Debian and Ubuntu names).
missing=() packages=()
need() {
  missing+=("$1")
  packages+=("$2")
}
for tool in gcc g++ make python3; do
  command -v "$tool" >/dev/null || need "$tool" "$tool"
done
if command -v python3 >/dev/null && ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
  need "python3's venv module" python3-venv
fi
if ((${#missing[@]})); then
  printf -v list '%s, ' "${missing[@]}"
  list=${list%, }
  command -v apt-get >/dev/null ||
    die "missing: $list. Install them with this system's package manager (Debian calls them ${packages[*]}) and run this again"
  [[ $(id -u) = 0 ]] ||
    die "missing: $list. Run 'sudo apt-get install -y --no-install-recommends ${packages[*]}' and run this again"
  say "missing: $list; installing ${packages[*]} with apt-get"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >&2 ||
    die "apt-get could not install ${packages[*]}; install them by hand and run this again"
fi

cd -- "$dest"
started=$SECONDS

if ! environment_works; then
  say "making a Python environment with cmake, ninja, gguf and numpy"
  rm -rf venv
  python3 -m venv venv || die "python3 could not make a virtual environment; on Debian install python3-venv"
  venv/bin/python -m pip install --quiet --disable-pip-version-check \
    'cmake>=3.28,<5' 'ninja>=1.11,<2' 'gguf==0.19.0' 'numpy>=1.26,<3' ||
    die "pip could not install cmake, ninja, gguf and numpy; is the package index (PyPI, or pip's index-url) reachable?"
fi
if works "$dest/llama-server"; then
  say "$dest/llama-server is there and works"
  exit 0
fi

if [[ ! -f src/.unpacked ]]; then
  archive=llama_cpp_python-$SDIST_VERSION.tar.gz
  if ! echo "$SDIST_SHA256  $archive" | sha256sum --check --status 2>/dev/null; then
    say "downloading $archive (77 MB)"
    venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
      "llama-cpp-python==$SDIST_VERSION" --dest . ||
      die "pip could not download llama-cpp-python==$SDIST_VERSION (source); is the package index reachable?"
    echo "$SDIST_SHA256  $archive" | sha256sum --check --status ||
      die "$archive is not the archive this recipe was written for (expected sha256 $SDIST_SHA256); delete $dest/$archive and try again"
  fi
  rm -rf src
  mkdir src
  tar -xzf "$archive" -C src --strip-components=3 "llama_cpp_python-$SDIST_VERSION/vendor/llama.cpp"
  touch src/.unpacked
fi

# Static: one file to cache and to copy. No native tuning: a cached binary must survive a change of CPU model.
# No llamafile kernels: without them a row's sum does not depend on how many rows are computed beside it, so that at
# temperature 0 a broken stream can be resumed, alone or among others, with the very same tokens.
# The UI, OpenSSL and subprocess options off: otherwise the build reaches for the network or for system libraries.
export PATH="$dest/venv/bin:$PATH"
say "configuring"
cmake -G Ninja -S src -B build --log-level=WARNING \
  -DCMAKE_BUILD_TYPE=Release -DCMAKE_EXE_LINKER_FLAGS="-static-libstdc++ -static-libgcc" \
  -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DGGML_LLAMAFILE=OFF -DGGML_OPENMP=OFF \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_IS_DEV=OFF \
  -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_SUBPROCESS=OFF >configure.log 2>&1 ||
  die "cmake refused; the last lines of $dest/configure.log:
$(tail -n 15 configure.log)"

say "compiling with $jobs jobs at low priority (about 200 files, 5 to 20 minutes on two cores); log: $dest/build.log"
nice -n 15 cmake --build build --target llama-server --parallel "$jobs" >build.log 2>&1 ||
  die "the compiler stopped; out of memory is the usual cause (use fewer JOBS). The last lines of $dest/build.log:
$(tail -n 15 build.log)"

# Moved into place in one step, so that nobody ever sees half a binary.
cp build/bin/llama-server llama-server.new
strip llama-server.new 2>/dev/null || true
works "$dest/llama-server.new" || die "the built binary does not answer --version; see $dest/build.log"
mv llama-server.new llama-server
[[ ${KEEP_BUILD:-0} = 1 ]] || rm -rf build src llama_cpp_python-*.tar.gz

say "done in $((SECONDS - started)) s: $dest/llama-server"
./llama-server --version >&2
