//! Building Rust for WebAssembly, with rustup's target where it can be had and with Debian's toolchain where not.

use std::{collections::BTreeMap, env, ffi::OsString, path::Path, path::PathBuf, process::Command};

use anyhow::{Result, bail};

use crate::{paths, run, system};

const TARGET: &str = "wasm32-unknown-unknown";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const BUILD_STD: &str = "-Zbuild-std=std,panic_abort";

/// A way to build for WebAssembly.
pub(crate) enum Toolchain {
    /// The toolchain that runs this, with the target's standard library.
    Rustup,
    /// Debian's `rustc-web`, which builds the standard library from its own source.
    Debian,
}

impl Toolchain {
    /// Finds one, installing what is missing. `XTASK_WASM_TOOLCHAIN=rustup|debian` chooses.
    pub(crate) fn find() -> Result<Self> {
        match env::var("XTASK_WASM_TOOLCHAIN").as_deref() {
            Ok("rustup") if rustup_target() => Ok(Self::Rustup),
            Ok("rustup") => bail!("rustup cannot add {TARGET}; unset XTASK_WASM_TOOLCHAIN to use Debian's toolchain instead"),
            Ok("debian") => debian(),
            Ok(other) => bail!("XTASK_WASM_TOOLCHAIN is {other:?}; use rustup or debian, or unset it"),
            Err(_) if rustup_target() => Ok(Self::Rustup),
            Err(_) => debian(),
        }
    }

    /// For people.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Rustup => "this toolchain's wasm32-unknown-unknown",
            Self::Debian => "Debian's rustc-web, with the standard library built from source",
        }
    }

    /// For tests that run `dynamo-host policy build`: what its cargo needs, as JSON; nothing with rustup's.
    pub(crate) fn for_tests(&self) -> Result<Option<String>> {
        let Self::Debian = self else { return Ok(None) };
        let mut environment: BTreeMap<_, _> =
            debian_environment()?.into_iter().map(|(name, value)| (name, value.map(|value| value.into_string().ok()))).collect();
        environment.insert("CARGO", Some(Some(DEBIAN_CARGO.to_owned())));
        Ok(Some(serde_json::json!({ "environment": environment, "arguments": [BUILD_STD] }).to_string()))
    }

    /// Builds packages; returns the folder of the modules.
    pub(crate) fn build(&self, packages: &[&str]) -> Result<PathBuf> {
        // A target directory of its own: another toolchain's artifacts must not invalidate the host's.
        let (mut command, directory) = match self {
            Self::Rustup => (run::cargo(), paths::target().join("wasm")),
            Self::Debian => (debian_cargo()?, paths::target().join("wasm-debian")),
        };
        command.args(["build", "--quiet", "--profile", "policy", "--target", TARGET, "--target-dir"]).arg(&directory);
        for package in packages {
            command.args(["--package", package]);
        }
        command.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS", without_local_paths());
        run::check(&mut command)?;
        Ok(directory.join(TARGET).join("policy"))
    }
}

/// Flags, besides those of `.cargo/config.toml`, that keep this machine's paths out of panic messages: the same source
/// is the same component, with the same digest, wherever it is built.
fn without_local_paths() -> String {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let remap = |path: &Path, to: &str| format!("--remap-path-prefix={}={to}", path.display());
    let home = home.map(|home| remap(&home, "cargo")).unwrap_or_default();
    format!("{home} {}", remap(&paths::root(), "."))
}

fn rustup_target() -> bool {
    let installed = || {
        let libraries =
            run::read(Command::new("rustc").args(["--print", "target-libdir", "--target", TARGET]).current_dir(paths::root()));
        libraries.is_ok_and(|path| Path::new(path.trim()).is_dir())
    };
    installed() || (run::works(Command::new("rustup").args(["target", "add", TARGET]).current_dir(paths::root())) && installed())
}

fn debian() -> Result<Toolchain> {
    if wasm_ld().is_none() || !Path::new(DEBIAN_CARGO).exists() || !Path::new("/usr/lib/rustlib/src").exists() {
        system::install(&["rustc-web", "cargo-web", "rust-web-src", "lld-22"], "building policies without rustup's wasm target")?;
    }
    Ok(Toolchain::Debian)
}

fn wasm_ld() -> Option<PathBuf> {
    let names = ["/usr/bin/wasm-ld", "/usr/bin/wasm-ld-22", "/usr/lib/llvm-22/bin/wasm-ld"];
    names.into_iter().map(PathBuf::from).find(|path| path.exists())
}

/// What Debian's cargo needs in its environment; without a value: what must not be there.
fn debian_environment() -> Result<Vec<(&'static str, Option<OsString>)>> {
    let Some(linker) = wasm_ld() else {
        bail!("wasm-ld is not there after installing lld-22; install any wasm-ld as /usr/bin/wasm-ld")
    };
    Ok(vec![
        ("CARGO", None),
        ("RUSTUP_TOOLCHAIN", None),
        ("RUSTC", None),
        ("LD_LIBRARY_PATH", None),
        // Debian's compiler finds its own parts only if nothing points it to rustup's.
        ("PATH", Some(format!("/usr/bin:{}", env::var("PATH").unwrap_or_default()).into())),
        ("RUSTC_BOOTSTRAP", Some("1".into())),
        ("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", Some(linker.into())),
    ])
}

fn debian_cargo() -> Result<Command> {
    let mut command = Command::new(DEBIAN_CARGO);
    command.current_dir(paths::root()).arg(BUILD_STD);
    for (name, value) in debian_environment()? {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    Ok(command)
}
