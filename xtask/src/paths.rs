//! Where things lie.

use std::{env, path::PathBuf};

/// The repository.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository").to_owned()
}

/// Cargo's target directory, which may be outside of the repository.
pub(crate) fn target() -> PathBuf {
    // Relative paths are relative to where cargo was called, as cargo takes them.
    env::var_os("CARGO_TARGET_DIR").map_or_else(
        || root().join("target"),
        |dir| env::current_dir().map_or_else(|_| dir.clone().into(), |current| current.join(&dir)),
    )
}

/// The policies as components.
pub(crate) fn policies() -> PathBuf {
    target().join("policies")
}

/// The test guests as components.
pub(crate) fn guests() -> PathBuf {
    target().join("guests")
}
