//! The command line: what it prints, what it refuses with exit code 2, what fails with exit code 1.

use std::{fs, net::TcpListener};

use serde_json::{Value, json};

use crate::harness::{
    components,
    host::{Host, MockProcess, completion},
    process::{Process, dynamo_host, run, serve},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `serve` with more arguments, which it should refuse before it listens.
async fn refuses(arguments: &[&str], says: &[&str]) {
    let finished = run(&serve(arguments)).await;
    finished.failed(2, says);
    assert!(!finished.stdout.contains("listening"), "{arguments:?}: {}", finished.stdout);
}

async fn refuses_config(text: &str, says: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    refuses(&["--config", file], &[&[file], says].concat()).await;
}

#[tokio::test]
async fn help_tells_the_commands_and_their_options() {
    let help = run(&["--help"]).await;
    for word in ["serve", "mock-engine", "policy", "worker", "config", "status", "simulate"] {
        assert!(help.succeeded().contains(word), "{word}: {}", help.stdout);
    }
    let help = run(&["serve", "--help"]).await;
    for word in [
        "--config",
        "--http",
        "--admin",
        "--worker",
        "--routing",
        "--routing-settings",
        "--state-dir",
        "--expose-worker",
        "--log",
    ] {
        assert!(help.succeeded().contains(word), "{word}: {}", help.stdout);
    }
    let help = run(&["policy", "--help"]).await;
    for word in ["activate", "list", "rollback", "check", "bench"] {
        assert!(help.succeeded().contains(word), "{word}: {}", help.stdout);
    }
    let help = run(&["worker", "--help"]).await;
    for word in ["list", "drain", "resume"] {
        assert!(help.succeeded().contains(word), "{word}: {}", help.stdout);
    }
    assert!(run(&["--version"]).await.succeeded().contains(VERSION));
}

#[tokio::test]
async fn unknown_flags_and_commands_are_refused() {
    run(&["serve", "--worker-url", "x"]).await.failed(2, &["--worker-url"]);
    run(&["sevre"]).await.failed(2, &["sevre", "serve"]);
    run(&[]).await.failed(2, &["serve"]);
    refuses(&["--log", "loud"], &["loud", "pretty", "json"]).await;
    refuses(&["--max-body-bytes", "many"], &["--max-body-bytes", "many"]).await;
}

#[tokio::test]
async fn an_unknown_key_in_the_config_is_named_with_its_place() {
    refuses_config("wokers = []\n", &["wokers"]).await;
    refuses_config("http = 3\n", &["http"]).await;
    refuses_config("http = \n", &["line 1"]).await;
    refuses_config("[limits]\nmax_body = 3\n", &["line 2", "max_body_bytes"]).await;
    refuses_config("[[worker]]\nurl = \"http://h:1\"\ncolour = \"red\"\n", &["colour", "labels"]).await;
    refuses(&["--config", "/nowhere/host.toml"], &["/nowhere/host.toml"]).await;
}

#[tokio::test]
async fn a_worker_that_cannot_be_is_refused_with_what_can() {
    refuses(&["--worker", "mock://b?model=m", "--worker", "mock://b?model=m"], &["mock://b", "twice"]).await;
    let same = ["--worker", "http://127.0.0.1:9,model=m", "--worker", "http://127.0.0.1:9,model=m"];
    refuses(&same, &["127.0.0.1:9", "twice"]).await;
    let named = ["--worker", "http://127.0.0.1:9,model=m,name=x", "--worker", "http://127.0.0.1:10,model=m,name=x"];
    refuses(&named, &["x", "twice"]).await;
    refuses(&["--worker", "ftp://b"], &["ftp://b", "http://"]).await;
    refuses(&["--worker", "mock://b?speeedup=3"], &["speeedup", "speedup"]).await;
    refuses(&["--worker", "http://127.0.0.1:9,colour=red"], &["colour", "label."]).await;
    refuses(&["--worker", "http://127.0.0.1:9,role=chef"], &["chef", "aggregated, prefill, decode or both"]).await;
    refuses(&["--worker", ""], &["--worker"]).await;
    run(&["serve"]).await.failed(2, &["no worker", "--worker"]);
}

#[tokio::test]
async fn a_busy_port_is_named() {
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = busy.local_addr().unwrap().to_string();
    let worker = "mock://a?model=m";
    let door_is_busy = ["serve", "--worker", worker, "--http", &address, "--admin", "127.0.0.1:0"];
    run(&door_is_busy).await.failed(2, &[&address, "in use", "--http"]);
    let admin_is_busy = ["serve", "--worker", worker, "--http", "127.0.0.1:0", "--admin", &address];
    run(&admin_is_busy).await.failed(2, &[&address, "in use", "--admin"]);
    run(&["mock-engine", "--http", &address, "--model", "m"]).await.failed(2, &[&address, "in use"]);
    run(&["serve", "--http", "nowhere", "--admin", "127.0.0.1:0"]).await.failed(2, &["nowhere"]);
}

#[tokio::test]
async fn an_admin_listener_that_others_can_reach_needs_a_token() {
    let open = ["serve", "--worker", "mock://a?model=m", "--http", "127.0.0.1:0", "--admin", "0.0.0.0:0"];
    run(&open).await.failed(2, &["0.0.0.0:0", "--admin-token"]);
    run(&[&open[..], &["--admin-token", ""]].concat()).await.failed(2, &["--admin-token"]);
    let mut command = dynamo_host(&[&open[..], &["--admin-token", "t"]].concat());
    let mut process = Process::start("dynamo-host serve", &mut command);
    process.listener("admin listening on http://0.0.0.0:").await;
}

#[tokio::test]
async fn a_config_file_says_what_flags_say_and_flags_win() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    let text = "http = \"127.0.0.1:1\"\nadmin = \"127.0.0.1:0\"\nexpose_worker = true\n\
        [[worker]]\nurl = \"mock://a?model=m&speedup=50\"\n";
    fs::write(&file, text).unwrap();
    let host = Host::start(&["--config", file.to_str().unwrap()]).await;
    assert_eq!(host.serves(2).await.header("x-dynamo-worker"), "a");
}

#[tokio::test]
async fn check_tells_what_a_policy_is() {
    let file = components::policy("least-loaded");
    let text = run(&["policy", "check", &file]).await;
    assert!(text.succeeded().contains(&format!("least-loaded@{VERSION}")), "{}", text.stdout);
    assert!(text.stdout.contains("prefill_token"), "its settings: {}", text.stdout);
    let told: Value = serde_json::from_str(run(&["policy", "check", &file, "--output", "json"]).await.succeeded()).unwrap();
    assert!(told.to_string().contains("prefill_token") && told["decisions"].as_array().unwrap().len() > 1, "{told}");

    run(&["policy", "check", &file, "--settings", r#"{"request": 1}"#]).await.succeeded();
    run(&["policy", "check", &file, "--settings", r#"{"request": -1}"#]).await.failed(1, &["request is -1"]);
    run(&["policy", "check", "/nowhere/policy.wasm"]).await.failed(1, &["/nowhere/policy.wasm"]);
    run(&["policy", "check", "/"]).await.failed(1, &["/"]);
}

#[tokio::test]
async fn bench_measures_each_number_of_candidates() {
    let file = components::policy("round-robin");
    let text = run(&["policy", "bench", &file, "--candidates", "4,8"]).await;
    assert!(text.succeeded().contains('8') && text.stdout.contains("round-robin"), "{}", text.stdout);
    let told = run(&["policy", "bench", &file, "--candidates", "4,8", "--output", "json"]).await;
    let told: Value = serde_json::from_str(told.succeeded()).unwrap();
    assert!(told.to_string().contains("\"candidates\":4") && told.to_string().contains("\"candidates\":8"), "{told}");
    run(&["policy", "bench", &file, "--candidates", "0"]).await.failed(2, &["--candidates"]);
    run(&["policy", "bench", &file, "--candidates", "four"]).await.failed(2, &["four"]);
}

#[tokio::test]
async fn list_and_status_tell_what_the_admin_api_tells() {
    let host = Host::over_mocks(&["alpha", "beta"], "speedup=50", &[]).await;
    host.activate(&components::policy("least-loaded"), &json!({ "request": 4.0 })).await;
    host.serves(2).await;
    let label = format!("least-loaded@{VERSION}");
    let text = host.cli(&["policy", "list"]).await;
    assert!(text.succeeded().contains("routing") && text.stdout.contains(&label), "{}", text.stdout);
    let told: Value = serde_json::from_str(host.cli(&["policy", "list", "--output", "json"]).await.succeeded()).unwrap();
    let slot = &told["slots"][0];
    assert_eq!((&slot["slot"], &slot["active"]["policy"]), (&json!("routing"), &json!(label)), "{told}");
    assert_eq!((&slot["active"]["calls"], &slot["active"]["settings"]), (&json!(1), &json!({ "request": 4.0 })), "{told}");

    let text = host.cli(&["status"]).await;
    for word in ["alpha", "beta", "healthy", &label, VERSION] {
        assert!(text.succeeded().contains(word), "{word}: {}", text.stdout);
    }
    let told: Value = serde_json::from_str(host.cli(&["status", "--output", "json"]).await.succeeded()).unwrap();
    assert_eq!((&told["version"], told["workers"].as_array().unwrap().len()), (&json!(VERSION), 2), "{told}");
}

#[tokio::test]
async fn a_host_that_is_not_there_is_a_clear_failure() {
    for command in
        [&["status"][..], &["policy", "list"], &["policy", "rollback", "routing"], &["policy", "activate", "routing", "native"]]
    {
        run(&[command, &["--admin", "http://127.0.0.1:1"]].concat()).await.failed(1, &["127.0.0.1:1"]);
    }
    let host = Host::over_mocks(&["a"], "", &[]).await;
    let missing = ["policy", "activate", "routing", "/nowhere/policy.wasm"];
    host.cli(&missing).await.failed(1, &["/nowhere/policy.wasm"]);
    // The front door's URL instead of the admin's.
    run(&["policy", "list", "--admin", host.http.base()]).await.failed(1, &["/v1/slots"]);
}

#[tokio::test]
async fn the_log_can_be_json() {
    let host = Host::over_mocks(&["a"], "speedup=50", &["--log", "json"]).await;
    host.serves(2).await;
    let log = host.process.log();
    assert!(!log.is_empty());
    for line in log.lines() {
        let _: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    }
}

#[tokio::test]
async fn a_request_to_stop_is_obeyed_when_streams_have_ended() {
    let mut host = Host::over_mocks(&["a"], "speedup=1", &[]).await;
    let stream = host.http.open("/v1/completions", &crate::harness::host::streamed(completion(60))).await;
    let terminated = std::process::Command::new("kill").arg(host.process.id().to_string()).status().unwrap();
    assert!(terminated.success());
    let answer = stream.streamed().await.unwrap();
    assert_eq!(dynamo_engine_mock::tokens::count(&answer.text()), Ok(60));
    assert_eq!(host.process.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_mock_engine_can_be_run_alone() {
    let engine = MockProcess::start(&["speedup=50", "max_model_len=100"]).await;
    let models = engine.http.get_json("/v1/models").await;
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!("m"), &json!(100)));
    let answer = engine.http.ask("/v1/completions", &completion(3)).await.json();
    assert_eq!(answer["choices"][0]["text"], "t0 t1 t2");
    let mock = ["mock-engine", "--http", "127.0.0.1:0", "--model", "m", "--profile"];
    run(&[&mock[..], &["speeedup=1"]].concat()).await.failed(2, &["speeedup", "speedup"]);
    run(&[&mock[..], &["speedup=0"]].concat()).await.failed(2, &["speedup"]);
    run(&[&mock[..], &["speedup"]].concat()).await.failed(2, &["speedup"]);
}
