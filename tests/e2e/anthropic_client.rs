//! The official Anthropic client for Python against the host: `tests/anthropic_client/test_client.py`, run by its
//! interpreter.

use std::{path::Path, process::Command, time::Duration};

use crate::harness::{
    host::Host,
    process::{Process, run},
};

/// Some ten seconds of work, on a machine that has other work.
const PATIENT: Duration = Duration::from_secs(600);

#[tokio::test]
async fn the_official_python_client_finds_nothing_amiss() {
    let python = std::env::var_os("DYNAMO_HOST_TEST_PYTHON")
        .expect("DYNAMO_HOST_TEST_PYTHON names no interpreter with the anthropic package; run: cargo xtask test");
    let directory = tempfile::tempdir().unwrap();
    let keys = directory.path().join("keys.toml");
    let made = run(&["key", "new", "a-tenant"]).await;
    std::fs::write(&keys, made.succeeded()).unwrap();
    let host = Host::start(&["--keys", keys.to_str().unwrap(), "--worker", "mock://a?model=m&speedup=50"]).await;

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/anthropic_client/test_client.py");
    let mut command = Command::new(python);
    command.arg(script).args(["--verbose"]).env("HOST_URL", host.http.base()).env("HOST_KEY", made.stderr.trim());
    // What users set for the real service must not reach the client here.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("ANTHROPIC_") || name.to_lowercase().ends_with("_proxy") {
            command.env_remove(name);
        }
    }
    let finished = Process::start("test_client.py", &mut command).finished_within(PATIENT).await;
    assert_eq!(finished.code, Some(0), "the client's tests failed:\n{}{}", finished.stdout, finished.stderr);
}
