//! What a policy's author does, with the program alone: a new crate, its tests, the component, its report, its activation.

use std::{env, fs, path::Path, process::Command, time::Duration};

use serde_json::Value;
use tokio::sync::Mutex;

use crate::harness::{
    components,
    host::Host,
    process::{Finished, Process, dynamo_host, run},
};

/// A compiler on a busy machine, with nothing compiled yet.
const COMPILED: Duration = Duration::from_secs(900);

/// `cargo` as an author has it, and not as the one that runs these tests: with what it compiles kept from run to run.
fn as_an_author(command: &mut Command, directory: &Path) {
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CARGO")) {
        if name != "CARGO_HOME" {
            command.env_remove(name);
        }
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("authors");
    // All crates are on this machine, since the workspace uses the same ones.
    command.current_dir(directory).env("CARGO_TARGET_DIR", target).env("CARGO_NET_OFFLINE", "true");
}

/// Where `xtask` builds policies with another toolchain than rustup's: its environment, and what its cargo is told.
fn with_the_toolchain(command: &mut Command) {
    let Ok(toolchain) = env::var("DYNAMO_HOST_TEST_WASM_TOOLCHAIN") else { return };
    let toolchain: Value = serde_json::from_str(&toolchain).unwrap();
    for (name, value) in toolchain["environment"].as_object().unwrap() {
        match value.as_str() {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.arg("--").args(toolchain["arguments"].as_array().unwrap().iter().map(|argument| argument.as_str().unwrap()));
}

async fn compiled(name: &str, mut command: Command) -> Finished {
    // They share a folder for what is built, with crates of the same name in it.
    static TURN: Mutex<()> = Mutex::const_new(());
    let _turn = TURN.lock().await;
    Process::start(name, &mut command).finished_within(COMPILED).await
}

async fn build(folder: &Path, more: &[&str]) -> Finished {
    let mut build = dynamo_host(&["policy", "build"]);
    build.args(more);
    as_an_author(&mut build, folder);
    with_the_toolchain(&mut build);
    compiled("policy build", build).await
}

#[tokio::test]
async fn a_new_policy_passes_its_tests_and_decides_in_a_running_host() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path().join("my-policy");
    run(&["policy", "new", "my-policy", "--dir", folder.to_str().unwrap()]).await.succeeded();

    // Optimized, so that build tools are compiled once for the tests and for the component.
    let mut cargo = Command::new("cargo");
    as_an_author(cargo.args(["test", "--release"]), &folder);
    let tested = compiled("cargo test", cargo).await;
    assert!(tested.succeeded().contains("3 passed"), "{}{}", tested.stdout, tested.stderr);

    let built = build(&folder, &[]).await;
    assert!(built.succeeded().contains("my-policy@0.1.0") && built.stdout.contains("max_error_rate"), "{}", built.stdout);

    let component = folder.join("my-policy.wasm");
    let component = component.to_str().unwrap();
    let bytes = fs::read(component).unwrap();
    for private in [directory.path().to_str().unwrap(), &env::var("HOME").unwrap()] {
        assert!(!bytes.windows(private.len()).any(|window| window == private.as_bytes()), "it holds the path {private}");
    }
    let report = run(&["policy", "check", component, "--output", "json"]).await;
    let report: Value = serde_json::from_str(report.succeeded()).unwrap();
    assert_eq!((&report["ok"], report["findings"].as_array().unwrap().len()), (&Value::Bool(true), 0), "{report}");

    let host = Host::over_mocks(&["a", "b"], "speedup=50", &[]).await;
    host.cli(&["policy", "activate", "routing", component, "--settings", r#"{"max_error_rate": 0.2}"#]).await.succeeded();
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "my-policy@0.1.0");

    fs::write(folder.join("src/lib.rs"), FORGETFUL).unwrap();
    let built = build(&folder, &["--out", "forgetful.wasm", "--output", "json"]).await;
    let report: Value = serde_json::from_str(built.succeeded()).unwrap();
    assert_eq!((&report["memory"], codes(&report)), (&"own".into(), vec!["no-alternative", "memory"]), "{report}");
    assert!(folder.join("forgetful.wasm").exists());
}

/// A policy that counts in its own memory.
const FORGETFUL: &str = r#"
use std::cell::Cell;
use dynamo_policy_sdk::{Candidates, Decision, NoSettings, Request, Router};

pub struct Forgetful(Cell<u32>);

impl Router for Forgetful {
    type Settings = NoSettings;

    fn new(_: NoSettings) -> Result<Self, String> {
        Ok(Self(Cell::new(0)))
    }

    fn route(&self, _: &Request, candidates: &Candidates) -> Decision {
        self.0.set(self.0.get() + 1);
        Decision::Place(vec![self.0.get() % candidates.count()])
    }
}

dynamo_policy_sdk::register!(Forgetful);
"#;

#[tokio::test]
async fn a_new_admission_policy_passes_its_tests_and_decides_in_a_running_host() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path().join("my-gate");
    run(&["policy", "new", "my-gate", "--world", "admission", "--dir", folder.to_str().unwrap()]).await.succeeded();
    let mut cargo = Command::new("cargo");
    as_an_author(cargo.args(["test", "--release"]), &folder);
    let tested = compiled("cargo test", cargo).await;
    assert!(tested.succeeded().contains("3 passed"), "{}{}", tested.stdout, tested.stderr);
    let built = build(&folder, &[]).await;
    assert!(built.succeeded().contains("my-gate@0.1.0") && built.stdout.contains("max_queued"), "{}", built.stdout);

    let component = folder.join("my-gate.wasm");
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let activate = ["policy", "activate", "admission", component.to_str().unwrap(), "--settings", r#"{"max_queued": 20}"#];
    assert!(host.cli(&activate).await.succeeded().contains("my-gate@0.1.0"));
    host.is_well().await;
}

#[tokio::test]
async fn what_cannot_be_a_new_policy_is_refused_and_writes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path().join("taken");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("precious"), "").unwrap();
    run(&["policy", "new", "p", "--dir", folder.to_str().unwrap()]).await.failed(1, &["taken", "--dir"]);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);

    let free = directory.path().join("free");
    let free_path = free.to_str().unwrap();
    for name in ["My Policy", "../up", "test", "fn", "policy-"] {
        run(&["policy", "new", name, "--dir", free_path]).await.failed(1, &[name, "my-policy"]);
    }
    run(&["policy", "new", "p", "--dir", free_path, "--sdk", free_path]).await.failed(1, &["--sdk", "Cargo.toml"]);
    assert!(!free.exists());
}

#[tokio::test]
async fn what_is_no_crate_is_not_built() {
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().to_str().unwrap();
    run(&["policy", "build", empty]).await.failed(1, &[empty, "Cargo.toml", "policy new"]);

    fs::create_dir(directory.path().join("src")).unwrap();
    fs::write(directory.path().join("src/lib.rs"), "").unwrap();
    fs::write(directory.path().join("Cargo.toml"), "[package]\nname = \"p\"\nedition = \"2024\"\n[workspace]\n").unwrap();
    build(directory.path(), &[]).await.failed(1, &["cdylib"]);

    let mut without_cargo = dynamo_host(&["policy", "build", empty]);
    without_cargo.env("CARGO", "/nowhere/cargo");
    compiled("policy build", without_cargo).await.failed(1, &["/nowhere/cargo", "rustup.rs"]);
}

#[tokio::test]
async fn inspect_tells_what_a_policy_reads_without_running_it() {
    // One that panics in `configure` can be inspected all the same.
    for file in [components::policy("least-loaded"), components::guest("hostile")] {
        let told = run(&["policy", "inspect", &file, "--output", "json"]).await;
        let told: Value = serde_json::from_str(told.succeeded()).unwrap();
        for key in ["name", "version", "author", "digest", "bytes", "world", "imports", "exports"] {
            assert!(told["policy"].get(key).is_some(), "{key}: {told}");
        }
        assert_eq!(told["contract"], "dynamo:policy@0.1.3");
    }
    let text = run(&["policy", "inspect", &components::policy("least-loaded")]).await;
    for word in ["least-loaded@", "active-prefill-tokens, active-decode-tokens, active-requests", "router"] {
        assert!(text.succeeded().contains(word), "{word}: {}", text.stdout);
    }
    assert!(!text.stdout.contains("session-key"), "what it does not read: {}", text.stdout);
    run(&["policy", "inspect", "/nowhere/policy.wasm"]).await.failed(1, &["/nowhere/policy.wasm"]);
}

async fn checked(file: &str, settings: &str) -> (Option<i32>, Value) {
    let finished = run(&["policy", "check", file, "--settings", settings, "--output", "json"]).await;
    (finished.code, serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {finished:?}")))
}

fn codes(report: &Value) -> Vec<&str> {
    report["findings"].as_array().unwrap().iter().map(|finding| finding["code"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn check_tells_what_a_policy_depends_on() {
    let (code, report) = checked(&components::policy("least-loaded"), "{}").await;
    assert_eq!((code, &report["memory"], &report["deterministic"]), (Some(0), &"none".into(), &true.into()), "{report}");
    assert_eq!(report["uses"]["candidates"].as_array().unwrap().len(), 3, "{report}");
    let (_, report) = checked(&components::policy("round-robin"), "{}").await;
    assert_eq!(report["memory"], "state", "{report}");
}

#[tokio::test]
async fn check_fails_for_what_would_fall_back_and_says_why() {
    let hostile = components::guest("hostile");
    for (settings, code, finding) in [
        (r#"{"mode": "trap-always"}"#, Some(1), "probe"),
        (r#"{"mode": "out-of-range", "at_max_output_tokens": 1}"#, Some(1), "fault"),
        (r#"{"mode": "reject", "at_max_output_tokens": 1}"#, Some(0), "rejects"),
        (r#"{"mode": "hold", "at_max_output_tokens": 1}"#, Some(0), "holds"),
    ] {
        let (exit, report) = checked(&hostile, settings).await;
        assert_eq!((exit, &report["ok"]), (code, &Value::Bool(code == Some(0))), "{settings}: {report}");
        assert!(codes(&report).contains(&finding), "{settings}: {report}");
    }
    let (code, report) = checked(&components::policy("least-loaded"), r#"{"request": -1}"#).await;
    assert_eq!((code, codes(&report)), (Some(1), vec!["settings"]), "{report}");
    let text = run(&["policy", "check", &components::policy("least-loaded"), "--settings", r#"{"quest": 1}"#]).await;
    text.failed(1, &["quest", "prefill_token", "number", "default 1.0", "default 64.0"]);
}

#[tokio::test]
async fn a_policy_can_be_composed_by_settings_alone() {
    let host = Host::over_mocks(&["a", "b", "c"], "speedup=50", &["--expose-worker"]).await;
    let settings = serde_json::json!({ "weights": { "session_affinity": 5, "prefix_affinity": 5 }, "picker": { "softmax": { "temperature": 0.01 } } });
    host.activate(&components::policy("composed"), &settings).await;
    let home = host.serves(2).await.header("x-dynamo-worker").to_owned();
    for _ in 0..10 {
        assert_eq!(host.serves(2).await.header("x-dynamo-worker"), home, "prompts that begin alike stay together");
    }
    for policy in ["session-affinity", "power-of-two"] {
        host.activate(&components::policy(policy), &serde_json::json!({})).await;
        assert!(host.serves(2).await.header("x-dynamo-policy").starts_with(policy));
    }
}
