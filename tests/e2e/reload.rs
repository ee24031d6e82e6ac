//! A configuration file that changes under a running host, and one that is checked without a host.

use std::{fs, path::PathBuf};

use dynamo_engine_mock::tokens;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    harness::{
        components, eventually,
        host::{Host, completion, streamed},
        process::run,
        replace,
    },
    workers::{workers, workers_until},
};

const COMPLETIONS: &str = "/v1/completions";

const ONE: &str = "[[worker]]\nurl = \"mock://a?model=m\"\n";

/// A host with a configuration file.
struct Scene {
    host: Host,
    file: PathBuf,
    _directory: TempDir,
}

impl Scene {
    async fn start(text: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("host.toml");
        fs::write(&file, text).unwrap();
        let host = Host::start(&["--config", file.to_str().unwrap()]).await;
        Self { host, file, _directory: directory }
    }

    fn write(&self, text: &str) {
        replace(&self.file, text);
    }

    async fn config(&self) -> Value {
        self.host.admin.get_json("/v1/status").await["config"].clone()
    }

    async fn config_until(&self, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        eventually(what, async || Some(self.config().await).filter(|config| condition(config))).await
    }
}

#[tokio::test]
async fn workers_names_and_limits_change_without_a_restart_and_running_requests_go_on() {
    let scene = Scene::start(ONE).await;
    let stream = scene.host.http.open(COMPLETIONS, &streamed(completion(150))).await;
    scene.write("[models]\ngpt = \"n\"\n[limits]\nmax_output_tokens = 5\n[[worker]]\nurl = \"mock://b?model=n&speedup=50\"\n");
    workers_until(&scene.host, "b is there", |rows| rows.iter().any(|row| row["name"] == "b" && row["state"] == "healthy")).await;
    scene.config_until("all of it is taken over", |config| config["reloads"].as_u64() >= Some(1)).await;
    let mut body = completion(3);
    body["model"] = "gpt".into();
    assert_eq!(scene.host.http.ask(COMPLETIONS, &body).await.header("x-dynamo-model"), "n");
    body["max_tokens"] = 6.into();
    scene.host.http.post(COMPLETIONS, body.to_string()).await.is_error(400, "invalid_field");
    assert_eq!(tokens::count(&stream.streamed().await.unwrap().text()), Ok(150));
    let rows = workers_until(&scene.host, "a is gone", |rows| rows.len() == 1).await;
    assert_eq!(rows[0]["name"], "b");
    assert_eq!(scene.config().await["needs_restart"], json!([]));
    assert!(scene.host.http.metric("dynamo_host_config_reloads_total", &[]).await >= 1.0);
}

#[tokio::test]
async fn a_file_that_cannot_be_run_changes_nothing_and_is_told_once() {
    let scene = Scene::start(ONE).await;
    scene.write("[[worker]]\nurl = \"mock://b?model=m\"\n[limits]\nmax_chioces = 3\n");
    let config = scene.config_until("the trouble is shown", |config| config["trouble"].is_string()).await;
    assert!(config["trouble"].as_str().unwrap().contains("max_chioces"), "{config}");
    assert_eq!(workers(&scene.host).await[0]["name"], "a");
    scene.host.serves(1).await;
    assert_eq!(scene.host.http.metric("dynamo_host_config_reload_failures_total", &[]).await, 1.0);
    scene.host.process.logs("cannot be run").await;
    assert_eq!(scene.host.process.log().matches("cannot be run").count(), 1, "{}", scene.host.process.log());
    let status = scene.host.cli(&["status"]).await;
    assert!(status.succeeded().contains("max_chioces"), "{}", status.stdout);
    // Two of a name: understood, but no roster.
    scene.write(&format!("{ONE}{ONE}"));
    scene.config_until("another trouble", |config| config["trouble"].as_str().is_some_and(|it| it.contains("twice"))).await;
    scene.write(ONE);
    scene.config_until("all is well", |config| config["trouble"].is_null()).await;
    scene.host.serves(1).await;
}

#[tokio::test]
async fn what_needs_a_restart_is_named() {
    let scene = Scene::start(ONE).await;
    scene.write(&format!("expose_worker = true\n[limits]\ndrain_s = 1\nmax_headers = 20\n{ONE}"));
    let config = scene.config_until("it is named", |config| config["needs_restart"] != json!([])).await;
    assert_eq!(config["needs_restart"], json!(["expose_worker", "limits.max_headers", "limits.drain_s"]));
    assert_eq!(scene.host.serves(1).await.header("x-dynamo-worker"), "");
    scene.write(ONE);
    scene.config_until("nothing is left", |config| config["needs_restart"] == json!([])).await;
}

#[tokio::test]
async fn the_log_level_changes_and_a_hangup_reads_the_file_again() {
    let scene = Scene::start(ONE).await;
    let before = scene.config().await["reloads"].as_u64().unwrap();
    let hung_up = std::process::Command::new("kill").args(["-HUP", &scene.host.process.id().to_string()]).status().unwrap();
    assert!(hung_up.success());
    scene.config_until("it was read", |config| config["reloads"].as_u64() > Some(before)).await;
    scene.host.serves(1).await;
    assert!(!scene.host.process.log().contains("request ended"));
    scene.write(&format!("log_level = \"debug\"\n{ONE}"));
    eventually("the log says more", async || {
        scene.host.serves(1).await;
        scene.host.process.log().contains("request ended").then_some(())
    })
    .await;

    // Without a file there is nothing to read, and nothing ends.
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    std::process::Command::new("kill").args(["-HUP", &host.process.id().to_string()]).status().unwrap();
    host.process.logs("no configuration file").await;
    host.is_well().await;
}

async fn check(text: &str, arguments: &[&str]) -> crate::harness::process::Finished {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    fs::write(&file, text).unwrap();
    run(&[&["config", "check", file.to_str().unwrap()], arguments].concat()).await
}

#[tokio::test]
async fn check_says_what_would_run_and_never_a_secret() {
    let policy = components::policy("least-loaded");
    let text = format!(
        "admin_token = \"hush-a\"\nrouting.policy = {policy:?}\n[models]\ngpt = \"m\"\nbig = {{ model = \"n\", fallbacks = [\"m\"] }}\n\
         [[worker]]\nurl = \"http://10.0.0.1:8000\"\nmodel = \"m\"\nkind = \"vllm\"\nranks = 2\nbearer = \"hush-b\"\n"
    );
    let told = check(&text, &[]).await;
    for word in ["can be run", "10.0.0.1:8000", "gpt -> m", "big -> n, else m", "kind vllm", "warning", "\"n\"", "least-loaded"] {
        assert!(told.succeeded().contains(word), "{word}: {}", told.stdout);
    }
    let json = check(&text, &["--output", "json"]).await;
    let value: Value = serde_json::from_str(json.succeeded()).unwrap();
    assert_eq!((&value["ok"], &value["config"]["workers"][0]["ranks"]), (&json!(true), &json!(2)), "{value}");
    assert!(!told.stdout.contains("hush") && !json.stdout.contains("hush"), "{}{}", told.stdout, json.stdout);
}

#[tokio::test]
async fn check_says_all_that_is_wrong() {
    check("[limits]\nmax_body = 3\n", &[]).await.failed(1, &["line 2", "max_body_bytes"]);
    check("[models]\na = \"b\"\nb = \"a\"\n", &[]).await.failed(1, &["circle"]);
    check(&format!("{ONE}{ONE}"), &[]).await.failed(1, &["twice"]);
    let several = "routing.policy = \"/nowhere/p.wasm\"\ndiscovery = [\"file:/nowhere/w\"]\nlog_level = \"a=b=c\"\n\
        [[worker]]\nurl = \"ftp://h\"\n[[worker]]\nurl = \"http://h\"\nbearer_env = \"DYNAMO_HOST_E2E_NO_SUCH\"\n";
    check(several, &[]).await.failed(1, &["ftp://h", "NO_SUCH", "/nowhere/p.wasm", "/nowhere/w", "log_level"]);
    let json = check(several, &["--output", "json"]).await;
    let value: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((json.code, &value["ok"], value["errors"].as_array().unwrap().len()), (Some(1), &json!(false), 5), "{value}");
    let empty = check("", &[]).await;
    assert!(empty.succeeded().contains("warning: there is no worker"), "{}", empty.stdout);
    run(&["config", "check", "/nowhere/host.toml"]).await.failed(1, &["/nowhere/host.toml"]);
}
