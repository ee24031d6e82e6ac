//! The structure that the design promises, held by tests.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{paths, policies, run};

/// Who may know whom, by package; what is not listed may know nobody of ours.
const EDGES: &[(&str, &[&str])] = &[
    ("dynamo-host-core", &[]),
    ("dynamo-host-policy", &["dynamo-host-core"]),
    ("dynamo-host-store", &["dynamo-host-core"]),
    ("dynamo-host-flow", &["dynamo-host-core"]),
    ("dynamo-host-index", &["dynamo-host-core"]),
    (
        "dynamo-host-sim",
        &["dynamo-host-core", "dynamo-host-flow", "dynamo-host-index", "dynamo-host-policy", "dynamo-engine-mock"],
    ),
    ("dynamo-host-tokens", &["dynamo-host-core"]),
    ("dynamo-engine-api", &["dynamo-host-core"]),
    ("dynamo-engine-kv-events", &["dynamo-engine-api"]),
    ("dynamo-engine-mock", &["dynamo-engine-api", "dynamo-engine-kv-events"]),
    ("dynamo-engine-openai", &["dynamo-engine-api", "dynamo-engine-kv-events"]),
    (
        "dynamo-host",
        &[
            "dynamo-host-core",
            "dynamo-host-flow",
            "dynamo-host-index",
            "dynamo-host-policy",
            "dynamo-host-sim",
            "dynamo-host-store",
            "dynamo-host-tokens",
            "dynamo-engine-api",
            "dynamo-engine-mock",
            "dynamo-engine-openai",
        ],
    ),
    ("dynamo-policy-sdk", &[]),
    ("adaptive", &["dynamo-policy-sdk"]),
    ("composed", &["dynamo-policy-sdk"]),
    ("disagg-conditional", &["dynamo-policy-sdk"]),
    ("fair-share", &["dynamo-policy-sdk"]),
    ("kv-aware", &["dynamo-policy-sdk"]),
    ("least-loaded", &["dynamo-policy-sdk"]),
    ("power-of-two", &["dynamo-policy-sdk"]),
    ("round-robin", &["dynamo-policy-sdk"]),
    ("session-affinity", &["dynamo-policy-sdk"]),
    ("slo-shed", &["dynamo-policy-sdk"]),
    ("token-bucket", &["dynamo-policy-sdk"]),
    ("two-tier", &["dynamo-policy-sdk"]),
    ("hostile", &["dynamo-policy-sdk"]),
    ("kv-cost", &["dynamo-policy-sdk"]),
    ("witness", &["dynamo-policy-sdk"]),
    ("witness-admission", &["dynamo-policy-sdk"]),
    ("xtask", &[]),
];

/// Packages that only one of ours may depend on.
const QUARANTINED: &[(&str, &str)] = &[
    ("wasmtime", "dynamo-host-policy"),
    ("sled", "dynamo-host-store"),
    ("zeromq", "dynamo-engine-kv-events"),
    ("rmpv", "dynamo-engine-kv-events"),
    ("tokenizers", "dynamo-host-tokens"),
    ("minijinja", "dynamo-host-tokens"),
    ("minijinja-contrib", "dynamo-host-tokens"),
    // The product has typed errors.
    ("anyhow", "xtask"),
];

struct Package {
    name: String,
    directory: String,
    /// Dependencies in builds, not those of tests alone.
    dependencies: BTreeSet<String>,
}

fn packages() -> Vec<Package> {
    let text = run::read(run::cargo().args(["metadata", "--format-version", "1", "--no-deps", "--offline"])).unwrap();
    let metadata: Value = serde_json::from_str(&text).unwrap();
    let root = format!("{}/", paths::root().display());
    let list = |value: &Value| value.as_array().unwrap().clone();
    let package = |package: Value| Package {
        name: package["name"].as_str().unwrap().to_owned(),
        directory: package["manifest_path"].as_str().unwrap().replace(&root, "").replace("/Cargo.toml", ""),
        dependencies: list(&package["dependencies"])
            .iter()
            .filter(|dependency| dependency["kind"].as_str() != Some("dev"))
            .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
            .collect(),
    };
    list(&metadata["packages"]).into_iter().map(package).collect()
}

#[test]
fn packages_know_only_whom_they_may() {
    let packages = packages();
    let allowed: BTreeMap<&str, &[&str]> = EDGES.iter().copied().collect();
    let ours: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    for package in &packages {
        let may = allowed.get(package.name.as_str()).unwrap_or_else(|| panic!("{} is not in the table of edges", package.name));
        for dependency in package.dependencies.iter().filter(|dependency| ours.contains(dependency.as_str())) {
            assert!(may.contains(&dependency.as_str()), "{} may not depend on {dependency}", package.name);
        }
    }
}

#[test]
fn heavy_dependencies_stay_where_they_are_contained() {
    for package in packages() {
        for (heavy, home) in QUARANTINED {
            assert!(!package.dependencies.contains(*heavy) || package.name == *home, "only {home} may depend on {heavy}");
        }
    }
}

#[test]
fn the_architecture_names_every_package_and_its_folder() {
    let text = fs::read_to_string(paths::root().join("ARCHITECTURE.md")).unwrap();
    for package in packages() {
        let folder = format!("`{}`", package.directory);
        assert!(text.contains(&folder), "ARCHITECTURE.md does not name {folder}");
    }
}

/// Who reads the wall clock, which may jump, and what for. Everything else measures by `Instant`.
const WALL_CLOCK: &[(&str, &str)] = &[
    ("host/src/clock.rs", "times that people and policies see, and when a key ends"),
    ("host/src/trace/layer.rs", "times of spans, which a collector compares with others'"),
    ("host/tokens/src/template.rs", "a chat template's date of today"),
    ("engines/kv-events/src/subscriber.rs", "the age of events by the engine's clock, for a metric"),
    ("engines/kv-events/src/publish.rs", "the mock engine's stamps on its events"),
    ("engines/mock/src/engine.rs", "when a reply was created, and the seed of ids"),
];

#[test]
fn the_wall_clock_is_read_where_a_jump_of_it_does_no_harm() {
    fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let root = paths::root();
    let mut found = Vec::new();
    ["host", "engines"].iter().for_each(|folder| sources(&root.join(folder), &mut found));
    let reads = |path: &PathBuf| {
        let relative = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        let is_test = relative.contains("/tests/") || relative.ends_with("/tests.rs");
        (!is_test && fs::read_to_string(path).unwrap().contains("SystemTime::now()")).then_some(relative)
    };
    let found: BTreeSet<String> = found.iter().filter_map(reads).collect();
    assert_eq!(found, WALL_CLOCK.iter().map(|(path, _)| (*path).to_owned()).collect());
}

#[test]
fn every_policy_and_guest_is_built_as_a_component() {
    let of = |folder: &str| -> BTreeSet<String> {
        packages().into_iter().filter_map(|package| package.directory.strip_prefix(folder).map(str::to_owned)).collect()
    };
    assert_eq!(of("policies/"), policies::POLICIES.iter().map(|&name| name.to_owned()).collect());
    assert_eq!(of("tests/guests/"), policies::GUESTS.iter().map(|&name| name.to_owned()).collect());
}

#[test]
fn ci_runs_the_readmes_test_command_and_nothing_else() {
    let readme = fs::read_to_string(paths::root().join("README.md")).unwrap();
    let script = fs::read_to_string(paths::root().join(".ci/run")).unwrap();
    let command = script.lines().rfind(|line| !line.trim().is_empty()).unwrap();
    let command = command.trim_start_matches("exec ");
    assert!(readme.lines().any(|line| line.trim() == command), "README.md does not name {command:?}");
}
