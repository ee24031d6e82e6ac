//! Policies and test guests: built for WebAssembly and wrapped as components.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use wit_component::ComponentEncoder;

use crate::{paths, wasm::Toolchain};

/// Crates under `policies/`.
pub(crate) const POLICIES: &[&str] = &[
    "adaptive",
    "composed",
    "disagg-conditional",
    "fair-share",
    "kv-aware",
    "least-loaded",
    "power-of-two",
    "round-robin",
    "session-affinity",
    "slo-shed",
    "token-bucket",
    "two-tier",
];
/// Crates under `tests/guests/`.
pub(crate) const GUESTS: &[&str] = &["hostile", "kv-cost", "witness", "witness-admission"];

/// Builds all of them; returns what they were built with.
pub(crate) fn build() -> Result<Toolchain> {
    let toolchain = Toolchain::find()?;
    println!("Building {} policies and {} test guests with {}", POLICIES.len(), GUESTS.len(), toolchain.name());
    let modules = toolchain.build(&[POLICIES, GUESTS].concat())?;
    for (crates, directory) in [(POLICIES, paths::policies()), (GUESTS, paths::guests())] {
        fs::create_dir_all(&directory)?;
        for name in crates {
            let module = modules.join(format!("{}.wasm", name.replace('-', "_")));
            let component = directory.join(format!("{name}.wasm"));
            let bytes = componentize(&module)?;
            // Tests and hosts may read it at this moment: replace it whole.
            let temporary = directory.join(format!(".{name}.wasm.{}", std::process::id()));
            fs::write(&temporary, &bytes)?;
            fs::rename(&temporary, &component)?;
            println!("  {} ({} kB)", component.display(), bytes.len() / 1000);
        }
    }
    Ok(toolchain)
}

fn componentize(module: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(module).with_context(|| format!("cannot read {}", module.display()))?;
    ComponentEncoder::default()
        .module(&bytes)
        .and_then(|encoder| encoder.validate(true).encode())
        .with_context(|| format!("{} is not a module that can be wrapped as a component", module.display()))
}
