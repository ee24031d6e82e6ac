//! The official OpenAI client for Python against the host: `tests/openai_client/test_client.py`, run by its interpreter.

use std::{path::Path, process::Command, time::Duration};

use crate::harness::{
    components,
    host::{Host, MockProcess},
    process::{Process, run},
};

/// Some ten seconds of work, on a machine that has other work.
const PATIENT: Duration = Duration::from_secs(600);

#[tokio::test]
async fn the_official_python_client_finds_nothing_amiss() {
    let python = std::env::var_os("DYNAMO_HOST_TEST_PYTHON")
        .expect("DYNAMO_HOST_TEST_PYTHON names no interpreter with the openai package; run: cargo xtask test");
    // Slow enough that a stream can be left before its end.
    let engine = MockProcess::start(&["speedup=5"]).await;
    let worker = format!("{},model=m,name=engine", engine.url());
    let routing = components::policy("least-loaded");
    let host = Host::start(&["--worker", &worker, "--routing", &routing, "--expose-worker"]).await;

    let in_process = ["--worker", "mock://a?model=m&speedup=50"];
    let streams = Host::start(&in_process).await;
    let directory = tempfile::tempdir().unwrap();
    let keys = directory.path().join("keys.toml");
    let made = run(&["key", "new", "a-tenant"]).await;
    std::fs::write(&keys, made.succeeded()).unwrap();
    let guarded = Host::start(&[&["--keys", keys.to_str().unwrap()], &in_process[..]].concat()).await;

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/openai_client/test_client.py");
    let mut command = Command::new(python);
    command.arg(script).args(["--verbose"]).env("HOST_URL", host.http.base()).env("ENGINE_URL", engine.url());
    command.env("STREAMS_URL", streams.http.base()).env("KEYS_URL", guarded.http.base()).env("HOST_KEY", made.stderr.trim());
    // What users set for the real service must not reach the client here.
    for name in [
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "OPENAI_ORG_ID",
        "OPENAI_PROJECT_ID",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ] {
        command.env_remove(name);
    }
    let finished = Process::start("test_client.py", &mut command).finished_within(PATIENT).await;
    assert_eq!(finished.code, Some(0), "the client's tests failed:\n{}{}", finished.stdout, finished.stderr);
    host.is_well().await;
}
