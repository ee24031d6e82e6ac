//! `dynamo-host policy new`: a crate that builds, and passes its own tests.
//!
//! Its author has this program and no repository: the SDK's sources are part of the program and are written beside the
//! crate, with the versions of this release.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Longest name: it becomes a metric label, a header and the name of a file.
const MAX_NAME_BYTES: usize = 64;

/// Names that cargo or Rust keep for themselves, and the SDK's own.
const RESERVED: &[&str] = &[
    "abstract",
    "alloc",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "build",
    "const",
    "continue",
    "core",
    "crate",
    "deps",
    "do",
    "dyn",
    "dynamo-policy-sdk",
    "else",
    "enum",
    "examples",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "incremental",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "native",
    "override",
    "priv",
    "proc-macro",
    "pub",
    "ref",
    "return",
    "sdk",
    "self",
    "static",
    "std",
    "struct",
    "super",
    "test",
    "trait",
    "true",
    "try",
    "type",
    "typeof",
    "unsafe",
    "unsized",
    "use",
    "virtual",
    "where",
    "while",
    "yield",
];

/// A file's place and its text, from the repository.
macro_rules! sources {
    ($from:literal: $($path:literal),+ $(,)?) => {
        &[$(($path, include_str!(concat!("../../../../", $from, $path)))),+]
    };
}

/// The SDK.
const SDK: &[(&str, &str)] = sources![
    "sdk/rust/":
    "src/admission.rs",
    "src/bindings.rs",
    "src/candidate.rs",
    "src/candidates.rs",
    "src/classes.rs",
    "src/codes.rs",
    "src/compose.rs",
    "src/compose/picker.rs",
    "src/compose/scorers.rs",
    "src/compose/settings.rs",
    "src/compose/tests.rs",
    "src/decision.rs",
    "src/guest.rs",
    "src/lib.rs",
    "src/links.rs",
    "src/outcomes.rs",
    "src/pools.rs",
    "src/rank.rs",
    "src/request.rs",
    "src/router.rs",
    "src/services.rs",
    "src/testing.rs",
    "src/testing/candidates.rs",
    "src/testing/links.rs",
    "src/testing/outcomes.rs",
    "src/testing/pools.rs",
    "src/testing/request.rs",
    "src/testing/services.rs",
    "src/verdict.rs",
];

/// The contract that it is generated from.
const CONTRACT: &[(&str, &str)] = sources![
    "wit/current/": "admission.wit", "autoscaler.wit", "candidates.wit", "links.wit", "outcomes.wit", "request.wit", "router.wit", "services.wit",
];

/// Where the SDK looks for the contract: in the repository, and beside itself.
const CONTRACT_PATH: (&str, &str) = ("../../wit/current", "wit");

/// The crate.
const TEMPLATE: &[(&str, &str)] =
    sources!["sdk/template/": "Cargo.toml.in", "src/lib.rs.in", "src/admission.rs.in", "README.md.in", "gitignore.in"];

/// The world that a policy is for.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub(in crate::cli) enum World {
    /// Chooses the workers for a request
    #[default]
    Router,
    /// Lets requests in, orders them, or sheds them
    Admission,
}

impl World {
    /// Name of the slot, where the policy's text is, and settings that it takes.
    fn parts(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Router => ("routing", "src/lib.rs.in", r#"{"max_error_rate": 0.2}"#),
            Self::Admission => ("admission", "src/admission.rs.in", r#"{"max_queued": 20}"#),
        }
    }

    /// Name of the slot.
    pub(super) fn slot(self) -> &'static str {
        self.parts().0
    }
}

const SDK_MANIFEST: &str = include_str!("../../../../sdk/rust/Cargo.toml");
const WORKSPACE_MANIFEST: &str = include_str!("../../../../Cargo.toml");

/// Writes a crate for a policy of this name into `directory`, which must not be there yet; against the SDK at `sdk`, or
/// one that is written beside it.
///
/// # Errors
/// Which of them cannot be, and what to do.
pub(super) fn write(name: &str, world: World, directory: &Path, sdk: Option<&Path>) -> Result<(), String> {
    validate(name)?;
    let sdk_path = match sdk {
        Some(path) => existing_sdk(path)?,
        None => "sdk".to_owned(),
    };
    if directory.exists() {
        return Err(format!("{} exists already; name another folder with --dir", directory.display()));
    }
    let (slot, source, settings) = world.parts();
    let fill = |text: &str| {
        let text = text.replace("{{name}}", name).replace("{{type}}", &type_name(name)).replace("{{sdk}}", &sdk_path);
        text.replace("{{slot}}", slot).replace("{{settings}}", settings)
    };
    for (path, text) in TEMPLATE {
        // Of the sources, that of its world is the crate's.
        let path = match *path {
            path if path == source => "src/lib.rs".to_owned(),
            path if path.starts_with("src/") => continue,
            path => path.trim_end_matches(".in").replace("gitignore", ".gitignore"),
        };
        put(&directory.join(path), &fill(text))?;
    }
    if sdk.is_none() {
        let sdk = directory.join("sdk");
        put(&sdk.join("Cargo.toml"), &sdk_manifest())?;
        for (path, text) in SDK {
            put(&sdk.join(path), &text.replace(CONTRACT_PATH.0, CONTRACT_PATH.1))?;
        }
        for (path, text) in CONTRACT {
            put(&sdk.join(CONTRACT_PATH.1).join(path), text)?;
        }
    }
    Ok(())
}

fn validate(name: &str) -> Result<(), String> {
    let rule = "use lower-case letters, digits and single hyphens, beginning with a letter, such as my-policy";
    let is_well_formed = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        && !name.ends_with('-')
        && !name.contains("--")
        && name.len() <= MAX_NAME_BYTES;
    if !is_well_formed {
        return Err(format!("{name:?} cannot be the name of a policy; {rule}, at most {MAX_NAME_BYTES} bytes"));
    }
    if RESERVED.contains(&name) {
        return Err(format!("{name:?} is a name that Rust or this program uses; {rule}"));
    }
    Ok(())
}

/// The absolute path of an SDK that is there.
fn existing_sdk(path: &Path) -> Result<String, String> {
    let wrong = |reason: String| format!("--sdk {}: {reason}; name the folder of dynamo-policy-sdk", path.display());
    let manifest = fs::read_to_string(path.join("Cargo.toml")).map_err(|error| wrong(format!("its Cargo.toml: {error}")))?;
    if !manifest.contains("name = \"dynamo-policy-sdk\"") {
        return Err(wrong("it is another crate".to_owned()));
    }
    let path = path.canonicalize().map_err(|error| wrong(error.to_string()))?;
    let text = path.to_str().filter(|path| !path.contains(['"', '\\', '\n']));
    text.map(str::to_owned).ok_or_else(|| wrong("its path cannot be written into a Cargo.toml".to_owned()))
}

/// `my-policy` as `MyPolicy`.
fn type_name(name: &str) -> String {
    let capitalized = |part: &str| part[..1].to_ascii_uppercase() + &part[1..];
    name.split('-').map(capitalized).collect()
}

/// The SDK's manifest without its workspace: what it inherits is stated, by the workspace's own lines.
fn sdk_manifest() -> String {
    let stated = |key: &str| {
        let line = WORKSPACE_MANIFEST.lines().find(|line| line.strip_prefix(key).is_some_and(|rest| rest.starts_with(" = ")));
        line.unwrap_or_else(|| panic!("the workspace does not state {key}")).to_owned()
    };
    let manifest = SDK_MANIFEST.replace("[lints]\nworkspace = true\n", "");
    let lines = manifest.lines().map(|line| match line.strip_suffix(".workspace = true") {
        Some(key) => stated(key),
        None => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n") + "\n"
}

fn put(path: &Path, text: &str) -> Result<(), String> {
    let failed = |error: io::Error| format!("{} cannot be written: {error}", path.display());
    let folder: PathBuf = path.parent().map(Path::to_owned).unwrap_or_default();
    fs::create_dir_all(folder).map_err(failed)?;
    fs::write(path, text).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_that_cargo_and_hosts_take_are_taken() {
        for name in ["a", "my-policy", "power-of-2", &"a".repeat(64)] {
            assert_eq!(validate(name), Ok(()), "{name}");
        }
        for name in ["", "2nd", "-a", "a-", "a--b", "My", "a_b", "a b", "é", "../a", "test", "fn", &"a".repeat(65)] {
            assert!(validate(name).unwrap_err().contains("such as my-policy"), "{name}");
        }
        assert_eq!(type_name("power-of-2"), "PowerOf2");
    }

    #[test]
    fn the_embedded_sdk_is_all_of_the_sdk() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for (folder, embedded) in [("sdk/rust/src", SDK), ("wit/current", CONTRACT), ("sdk/template", TEMPLATE)] {
            let of = |folder: &str| folder.strip_suffix("/src").unwrap_or(folder).to_owned() + "/";
            let mut found = BTreeSet::new();
            walk(&root.join(folder), &mut |path| {
                found.insert(path.strip_prefix(root.join(of(folder))).unwrap().to_str().unwrap().to_owned());
            });
            assert_eq!(found, embedded.iter().map(|(path, _)| (*path).to_owned()).collect(), "{folder}");
        }
    }

    fn walk(folder: &Path, found: &mut impl FnMut(&Path)) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, found) } else { found(&path) }
        }
    }

    #[test]
    fn the_embedded_sdk_stands_without_the_repository() {
        let manifest: toml::Table = sdk_manifest().parse().unwrap();
        assert_eq!(manifest["package"]["version"].as_str(), Some(env!("CARGO_PKG_VERSION")));
        assert!(manifest["dependencies"]["serde"].get("version").is_some());
        assert!(!sdk_manifest().contains("workspace"));
        let uses = SDK.iter().filter(|(_, text)| text.contains(CONTRACT_PATH.0)).count();
        assert_eq!(uses, 1, "the contract is found in one place");
        for (path, text) in SDK {
            assert!(!text.contains("\"../../../"), "{path} includes a file of the repository");
        }
    }
}
