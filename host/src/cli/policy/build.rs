//! `dynamo-host policy build`: from a crate to a component, by the author's own cargo.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use wit_component::ComponentEncoder;

const TARGET: &str = "wasm32-unknown-unknown";
/// Deterministic, and every host that runs policies has it.
const FEATURES: &str = "-Ctarget-feature=+simd128";

/// Builds the crate in `directory` and writes its component to `out`, by default beside the crate's manifest. `more` is for
/// cargo. Returns where the component lies.
///
/// # Errors
/// What failed, and what to do about it.
pub(super) fn build(directory: &Path, out: Option<&Path>, more: &[String]) -> Result<PathBuf, String> {
    if !directory.join("Cargo.toml").is_file() {
        let start = "dynamo-host policy new NAME writes one";
        return Err(format!("{} has no Cargo.toml; name the folder of a policy's crate, {start}", directory.display()));
    }
    let module = compile(directory, more)?;
    let bytes = fs::read(&module).map_err(|error| format!("{}: {error}", module.display()))?;
    let component = ComponentEncoder::default()
        .module(&bytes)
        .and_then(|encoder| encoder.validate(true).encode())
        .map_err(|error| format!("{} cannot become a component: {error:#}; does it call register!?", module.display()))?;
    let name = module.file_stem().unwrap_or_default().to_string_lossy().replace('_', "-");
    let out = out.map_or_else(|| directory.join(format!("{name}.wasm")), Path::to_owned);
    write_whole(&out, &component)?;
    Ok(out)
}

/// Runs cargo and returns the module that it made.
fn compile(directory: &Path, more: &[String]) -> Result<PathBuf, String> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(&cargo)
        .args(["build", "--release", "--lib", "--target", TARGET, "--message-format", "json-render-diagnostics"])
        .args(more)
        .current_dir(directory)
        .env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS", flags(directory))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("{} cannot be run: {error}; install Rust from https://rustup.rs", cargo.display()))?;
    if !output.status.success() {
        let hint =
            if has_target(directory) { "see above" } else { "add the target with: rustup target add wasm32-unknown-unknown" };
        return Err(format!("cargo build for {TARGET} failed with {}; {hint}", output.status));
    }
    let module = String::from_utf8_lossy(&output.stdout).lines().filter_map(module).next_back();
    module.ok_or_else(|| {
        format!("the crate in {} makes no module; it needs [lib] crate-type = [\"cdylib\", \"rlib\"]", directory.display())
    })
}

/// The module that a line of cargo's tells of, if it does.
fn module(line: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(line).ok()?;
    let is_library = message["target"]["crate_types"].as_array()?.iter().any(|kind| kind == "cdylib");
    let files = message["filenames"].as_array().filter(|_| is_library && message["reason"] == "compiler-artifact")?;
    files.iter().filter_map(Value::as_str).find(|file| file.ends_with(".wasm")).map(PathBuf::from)
}

/// Flags that keep this machine's paths out of panic messages: the same source is the same component wherever it is built.
fn flags(directory: &Path) -> String {
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let remap = |path: Option<PathBuf>, to: &str| match path.as_deref().and_then(Path::to_str) {
        // Flags are separated by blanks.
        Some(path) if !path.contains(char::is_whitespace) => format!(" --remap-path-prefix={path}={to}"),
        _ => String::new(),
    };
    format!("{FEATURES}{}{}", remap(cargo_home, "cargo"), remap(directory.canonicalize().ok(), "."))
}

/// Whether the toolchain of this folder has the target's standard library.
fn has_target(directory: &Path) -> bool {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let asked = Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]).current_dir(directory).output();
    asked.is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir())
}

/// A host may be reading it: it is replaced whole.
fn write_whole(out: &Path, bytes: &[u8]) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{} cannot be written: {error}", out.display());
    let mut temporary = out.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    fs::write(&temporary, bytes).map_err(failed)?;
    fs::rename(&temporary, out).map_err(|error| {
        // Nothing of it is of use.
        let _ = fs::remove_file(&temporary);
        failed(error)
    })
}
