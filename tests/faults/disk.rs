//! A state directory that takes no more bytes.

use std::process::Command;

use hyper::{Method, body::Bytes};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::json;

use crate::{
    engines::{Engines, STEADY},
    harness::{
        client::Client,
        components,
        host::Host,
        process::{BINARY, Process},
    },
};

/// A host whose files can be kept from growing: a process is killed for that unless it ignores the signal.
async fn host(arguments: &[String]) -> Host {
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; exec \"$@\"", "sh", BINARY]);
    command.args(["serve", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0"]).args(arguments);
    let mut process = Process::start("dynamo-host serve", &mut command);
    let http = Client::new(&process.listener("front door listening on http://").await);
    let admin = Client::new(&process.listener("admin listening on http://").await);
    let host = Host { process, http, admin };
    host.workers_are("healthy").await;
    host
}

/// Lets no file of the host's grow, or lets them grow again.
fn fill_disk(host: &Host, is_full: bool) {
    let pid = Pid::from_raw(host.process.id().try_into().unwrap());
    prlimit(pid, Resource::Fsize, Rlimit { current: is_full.then_some(0), maximum: None }).unwrap();
}

#[tokio::test]
async fn a_full_disk_costs_changes_and_receipts_but_no_request() {
    let engines = Engines::start(1, &STEADY).await;
    let directory = tempfile::tempdir().unwrap();
    let mut arguments = engines.arguments();
    arguments.extend(["--state-dir".to_owned(), directory.path().to_str().unwrap().to_owned()]);
    let first = host(&arguments).await;
    first.activate(&components::policy("round-robin"), &json!({})).await;
    let active = first.active().await;

    fill_disk(&first, true);
    let policy = std::fs::read(components::policy("least-loaded")).unwrap();
    let native = first.admin.send(Method::DELETE, "/v1/slots/routing/policy", &[], Bytes::new()).await;
    for refused in [native, first.put_policy(policy, "{}").await] {
        assert!(refused.status.as_u16() >= 400, "it acknowledges what is not kept: {} {}", refused.status, refused.text());
        assert!(!refused.json()["error"]["message"].as_str().unwrap_or_default().is_empty(), "{}", refused.text());
        assert_eq!(first.active().await, active, "what cannot be kept is not in force");
    }
    for _ in 0..20 {
        first.serves(3).await;
    }
    first.is_well().await;
    fill_disk(&first, false);
    first.is_well().await;
    drop(first);

    let second = host(&arguments).await;
    assert_eq!(second.active().await, active, "what was acknowledged is there");
    second.activate(&components::policy("least-loaded"), &json!({})).await;
    second.is_well().await;
}
