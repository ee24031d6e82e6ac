//! State on disk: what was active survives `kill -9`; what is lost or broken is said clearly, and service goes on natively.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use serde_json::json;

use crate::harness::{
    components,
    host::{Host, completion},
    process::{Process, dynamo_host, run, serve},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A host over one mock engine with its state in `directory`.
async fn host_in(directory: &Path, more: &[&str]) -> Host {
    Host::over_mocks(&["a"], "speedup=50", &[&["--state-dir", directory.to_str().unwrap()], more].concat()).await
}

async fn is_active(host: &Host, policy: &str) {
    assert_eq!(host.active().await, policy);
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), policy);
}

/// All files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The stored policies' files.
fn policy_files(directory: &Path) -> Vec<PathBuf> {
    let found: Vec<_> = files(directory).into_iter().filter(|path| path.extension().is_some_and(|kind| kind == "wasm")).collect();
    assert!(!found.is_empty(), "no .wasm among {:?}", files(directory));
    found
}

#[tokio::test]
async fn the_active_policy_its_settings_and_history_survive_kill_9() {
    let directory = tempfile::tempdir().unwrap();
    let mut host = host_in(directory.path(), &[]).await;
    host.activate(&components::policy("round-robin"), &json!({})).await;
    host.activate(&components::policy("least-loaded"), &json!({ "request": 5.0 })).await;
    // Right after the answer: it comes only when the state is on disk.
    host.process.kill();

    let mut host = host_in(directory.path(), &[]).await;
    is_active(&host, &format!("least-loaded@{VERSION}")).await;
    assert_eq!(host.slot().await["active"]["settings"], json!({ "request": 5.0 }));
    host.cli(&["policy", "rollback", "routing"]).await.succeeded();
    host.process.kill();

    let host = host_in(directory.path(), &[]).await;
    is_active(&host, &format!("round-robin@{VERSION}")).await;
    host.cli(&["policy", "rollback", "routing"]).await.succeeded();
    is_active(&host, "native").await;
}

#[tokio::test]
async fn native_is_remembered_too() {
    let directory = tempfile::tempdir().unwrap();
    let mut host = host_in(directory.path(), &[]).await;
    host.activate(&components::policy("round-robin"), &json!({})).await;
    host.activate_native().await;
    host.process.kill();
    is_active(&host_in(directory.path(), &[]).await, "native").await;
}

#[tokio::test]
async fn a_damaged_policy_file_is_named_and_service_goes_on_natively() {
    for damage in ["truncated", "emptied", "removed", "overwritten"] {
        let directory = tempfile::tempdir().unwrap();
        let mut host = host_in(directory.path(), &[]).await;
        host.activate(&components::policy("round-robin"), &json!({})).await;
        host.process.kill();
        let stored = policy_files(directory.path());
        for file in &stored {
            let bytes = fs::read(file).unwrap();
            match damage {
                "truncated" => fs::write(file, &bytes[..bytes.len() / 2]).unwrap(),
                "emptied" => fs::write(file, b"").unwrap(),
                // Another policy, whole and sound, but not the one that was activated.
                "overwritten" => fs::write(file, fs::read(components::policy("least-loaded")).unwrap()).unwrap(),
                _ => fs::remove_file(file).unwrap(),
            }
        }
        let host = host_in(directory.path(), &[]).await;
        is_active(&host, "native").await;
        let name = stored[0].file_name().unwrap().to_str().unwrap();
        host.process.logs(name.trim_end_matches(".wasm")).await;
        assert!(!host.process.panicked(), "{damage}");
        let list = host.cli(&["policy", "list"]).await;
        assert!(list.succeeded().contains("trouble: the active policy"), "{damage}: {}", list.stdout);
        let failures = host.http.metric("dynamo_host_policy_restore_failures_total", &[("what", "active")]).await;
        assert_eq!(failures, 1.0, "{damage}");

        // It is put right by activating it again.
        host.activate(&components::policy("round-robin"), &json!({})).await;
        is_active(&host, &format!("round-robin@{VERSION}")).await;
        assert!(host.slot().await["trouble"].is_null());
    }
}

#[tokio::test]
async fn an_earlier_policy_that_is_damaged_is_passed_over_by_rollbacks() {
    let directory = tempfile::tempdir().unwrap();
    let mut host = host_in(directory.path(), &[]).await;
    host.activate(&components::policy("least-loaded"), &json!({})).await;
    let before: HashSet<_> = policy_files(directory.path()).into_iter().collect();
    host.activate(&components::policy("round-robin"), &json!({})).await;
    let after: HashSet<_> = policy_files(directory.path()).into_iter().collect();
    host.activate(&components::guest("hostile"), &json!({})).await;
    host.process.kill();
    let [damaged] = after.difference(&before).collect::<Vec<_>>()[..] else { panic!("one file more: {before:?}, {after:?}") };
    fs::write(damaged, b"damaged").unwrap();

    let mut host = host_in(directory.path(), &[]).await;
    is_active(&host, &format!("hostile@{VERSION}")).await;
    assert_eq!(host.roll_back().await.status, 200);
    is_active(&host, &format!("least-loaded@{VERSION}")).await;
    host.process.kill();
    // What was active when it was killed, not what was active long ago.
    is_active(&host_in(directory.path(), &[]).await, &format!("least-loaded@{VERSION}")).await;
}

#[tokio::test]
async fn the_kill_switch_and_what_happens_on_errors_survive_kill_9() {
    let directory = tempfile::tempdir().unwrap();
    let mut host = host_in(directory.path(), &["--routing-on-error", "last-good"]).await;
    host.activate(&components::policy("round-robin"), &json!({})).await;
    assert_eq!(host.slot().await["on_error"], "last-good");
    host.cli(&["policy", "on-error", "routing", "closed"]).await.succeeded();
    let bypassed = host.cli(&["policy", "bypass", "routing"]).await;
    assert!(!bypassed.succeeded().contains("forget"), "{}", bypassed.stdout);
    host.process.kill();

    // What was said last wins, and the flag has not changed.
    let mut host = host_in(directory.path(), &["--routing-on-error", "last-good"]).await;
    assert_eq!((&host.slot().await["on_error"], &host.slot().await["bypass"]), (&json!("closed"), &json!(true)));
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "native; bypass");
    host.process.logs("policy bypass routing --off").await;
    host.cli(&["policy", "bypass", "routing", "--off"]).await.succeeded();
    is_active(&host, &format!("round-robin@{VERSION}")).await;
    host.process.kill();

    // Now it has.
    let mut host = host_in(directory.path(), &["--routing-on-error", "fallback"]).await;
    assert_eq!((&host.slot().await["on_error"], &host.slot().await["bypass"]), (&json!("fallback"), &json!(false)));
    host.cli(&["policy", "on-error", "routing", "last-good"]).await.succeeded();
    host.process.kill();
    assert_eq!(host_in(directory.path(), &[]).await.slot().await["on_error"], "last-good");
}

#[tokio::test]
async fn a_policy_that_is_lost_is_not_replaced_where_the_slot_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let mut host = host_in(directory.path(), &["--routing-on-error", "closed"]).await;
    host.activate(&components::policy("round-robin"), &json!({})).await;
    host.process.kill();
    policy_files(directory.path()).iter().for_each(|file| fs::remove_file(file).unwrap());
    let host = host_in(directory.path(), &[]).await;
    let refused = async || {
        let reply = host.http.post("/v1/completions", completion(2).to_string()).await;
        reply.is_error(503, "policy_failed");
        assert_eq!(reply.header("x-dynamo-policy"), format!("closed; fallback=missing; policy=round-robin@{VERSION}"));
    };
    refused().await;
    host.cli(&["policy", "bypass", "routing"]).await.succeeded();
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "native; bypass");
    host.cli(&["policy", "bypass", "routing", "--off"]).await.succeeded();
    refused().await;
    host.activate(&components::policy("least-loaded"), &json!({})).await;
    is_active(&host, &format!("least-loaded@{VERSION}")).await;
}

#[tokio::test]
async fn the_kill_switch_works_on_broken_state_and_says_that_it_is_not_kept() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a-file");
    fs::write(&file, "x").unwrap();
    let host = host_in(&file, &["--routing-on-error", "closed"]).await;
    host.http.post("/v1/completions", completion(2).to_string()).await.is_error(503, "policy_failed");
    let bypassed = host.cli(&["policy", "bypass", "routing"]).await;
    assert!(bypassed.succeeded().contains("a restart will forget that"), "{}", bypassed.stdout);
    assert!(bypassed.stdout.contains(file.to_str().unwrap()), "{}", bypassed.stdout);
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "native; bypass");
    // Another change is not made where it cannot be kept.
    host.cli(&["policy", "on-error", "routing", "fallback"]).await.failed(1, &["cannot be kept"]);
    assert_eq!(host.slot().await["on_error"], "closed");
}

#[tokio::test]
async fn broken_state_is_said_clearly_and_service_goes_on() {
    for damage in ["truncated", "overwritten", "half"] {
        let directory = tempfile::tempdir().unwrap();
        let mut host = host_in(directory.path(), &[]).await;
        host.activate(&components::policy("round-robin"), &json!({})).await;
        host.process.kill();
        let is_state = |path: &PathBuf| path.extension().is_none_or(|kind| kind != "wasm");
        for file in files(directory.path()).into_iter().filter(is_state) {
            let bytes = fs::read(&file).unwrap();
            match damage {
                "truncated" => fs::write(file, b"").unwrap(),
                "half" => fs::write(file, &bytes[..bytes.len() / 2]).unwrap(),
                _ => fs::write(file, vec![0xa5; bytes.len().max(64)]).unwrap(),
            }
        }
        let mut host = host_in(directory.path(), &[]).await;
        is_served_though_broken(&host, directory.path(), damage).await;
        host.process.kill();

        // As the message says: moved away, the host starts anew.
        fs::remove_dir_all(directory.path()).unwrap();
        let mut host = host_in(directory.path(), &[]).await;
        host.activate(&components::policy("least-loaded"), &json!({})).await;
        host.process.kill();
        is_active(&host_in(directory.path(), &[]).await, &format!("least-loaded@{VERSION}")).await;
    }
}

/// Whatever could be read: it serves, it says what could not, and it takes no change that it could not keep.
async fn is_served_though_broken(host: &Host, directory: &Path, damage: &str) {
    let policy = host.active().await;
    is_active(host, &policy).await;
    if policy == "native" {
        host.process.logs(directory.to_str().unwrap()).await;
        let log = host.process.log();
        assert!(log.contains("ERROR"), "{damage}: the log says what is broken: {log}");
    }
    let reply = host.put_policy(fs::read(components::policy("least-loaded")).unwrap(), "{}").await;
    if reply.status.is_success() {
        is_active(host, &format!("least-loaded@{VERSION}")).await;
    } else {
        let message = reply.is_error(503, "state");
        assert!(message.contains(directory.to_str().unwrap()), "{damage}: {message}");
    }
}

#[tokio::test]
async fn what_was_activated_wins_over_the_flag_until_the_flag_changes() {
    let directory = tempfile::tempdir().unwrap();
    let [round_robin, least_loaded] = ["round-robin", "least-loaded"].map(components::policy);
    let [round_robin_label, least_loaded_label] = ["round-robin", "least-loaded"].map(|name| format!("{name}@{VERSION}"));
    let seeded = ["--routing", &round_robin];
    let mut host = host_in(directory.path(), &seeded).await;
    is_active(&host, &round_robin_label).await;
    host.activate(&least_loaded, &json!({ "request": 9.0 })).await;
    host.process.kill();

    let mut host = host_in(directory.path(), &seeded).await;
    is_active(&host, &least_loaded_label).await;
    host.process.kill();

    let mut host = host_in(directory.path(), &["--routing", "native"]).await;
    is_active(&host, "native").await;
    host.activate(&least_loaded, &json!({})).await;
    host.process.kill();

    // Settings are part of the flag.
    let with_settings = ["--routing", &least_loaded, "--routing-settings", r#"{"request": 2.0}"#];
    let mut host = host_in(directory.path(), &with_settings).await;
    assert_eq!(host.slot().await["active"]["settings"], json!({ "request": 2.0 }));
    host.activate(&round_robin, &json!({})).await;
    host.process.kill();

    let mut host = host_in(directory.path(), &with_settings).await;
    is_active(&host, &round_robin_label).await;
    host.process.kill();

    // Without a flag nothing is seeded.
    is_active(&host_in(directory.path(), &[]).await, &round_robin_label).await;
}

#[tokio::test]
async fn two_hosts_do_not_share_a_state_directory() {
    let directory = tempfile::tempdir().unwrap();
    let mut first = host_in(directory.path(), &[]).await;
    first.activate(&components::policy("round-robin"), &json!({})).await;
    let path = directory.path().to_str().unwrap();
    // It must not serve with another policy than the operator takes it to have.
    let second = run(&serve(&["--state-dir", path])).await;
    second.failed(2, &["in use", path, "--state-dir"]);

    first.process.kill();
    is_active(&host_in(directory.path(), &[]).await, &format!("round-robin@{VERSION}")).await;
}

#[tokio::test]
async fn a_state_directory_that_cannot_be_is_said_clearly() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a-file");
    fs::write(&file, "x").unwrap();
    for path in [file.clone(), file.join("state")] {
        let host = host_in(&path, &[]).await;
        is_served_though_broken(&host, &path, "a file in its place").await;
    }
    assert_eq!(fs::read(&file).unwrap(), b"x");
}

#[tokio::test]
async fn compiled_policies_are_for_their_user_alone() {
    use std::os::unix::fs::PermissionsExt as _;

    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("new/state");
    let host = host_in(&directory, &[]).await;
    host.activate(&components::policy("round-robin"), &json!({})).await;
    let mode = fs::metadata(directory.join("compiled")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "mode {mode:o}");
}

#[tokio::test]
async fn without_a_state_directory_nothing_is_kept_and_that_is_said() {
    let here = tempfile::tempdir().unwrap();
    let mut command = dynamo_host(&serve(&[]));
    command.current_dir(here.path());
    let mut process = Process::start("dynamo-host serve", &mut command);
    process.listener("admin listening on http://").await;
    process.logs("--state-dir").await;
    assert_eq!(files(here.path()), Vec::<PathBuf>::new());
}
