//! `dynamo-host profile` finds what an engine is, and workers carry it to policies.

use std::fs;

use serde_json::{Value, json};

use crate::harness::{
    components, eventually,
    host::{Host, MockProcess},
    process::{Process, dynamo_host, run},
    scripted::{Scripted, whole_answer},
};

/// Measures an engine whose times stand out of the noise of a busy machine.
#[tokio::test]
async fn a_modelled_engines_parameters_are_found_again() {
    let engine = MockProcess::start(&[
        "prefill_ms_base=40",
        "prefill_ms_per_token=0.2",
        "prefill_ms_per_token_squared=0",
        "decode_ms_base=20",
        "decode_ms_per_sequence=4",
        "decode_ms_per_context_token=0",
        "kv_blocks=9000",
        "max_num_seqs=100",
        "max_num_batched_tokens=4096",
        "max_model_len=5000",
    ])
    .await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("engine.json");
    let file = file.to_str().unwrap();
    let arguments = ["profile", engine.url(), "--kind", "vllm", "--max-seconds", "90", "--max-prompt", "2048", "--out", file];
    let process = Process::start("dynamo-host profile".to_owned(), &mut dynamo_host(&arguments));
    let finished = process.finished_within(std::time::Duration::from_secs(150)).await;
    finished.succeeded();
    assert!(finished.stderr.contains("R²") && finished.stderr.contains("worst at"), "{}", finished.stderr);
    let profile: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    for (key, value) in [("block_size", 16), ("kv_blocks", 9000), ("max_model_len", 5000)] {
        assert_eq!(profile[key], value, "{key} is told by the engine: {}", finished.stderr);
    }
    // The model's times are least times: a machine with other work only adds to them, here at most their half again.
    let near = |measured: f64, real: f64| {
        assert!((0.7 * real..1.5 * real).contains(&measured), "{measured} for {real}: {profile:#}\n{}", finished.stderr);
    };
    let number = |key: &str| profile[key].as_f64().unwrap();
    let prefill_1000 =
        number("prefill_ms_base") + 1000.0 * number("prefill_ms_per_token") + 1e6 * number("prefill_ms_per_token_squared");
    near(prefill_1000, 240.0);
    near(number("prefill_ms_base"), 40.0);
    let step = |batch: f64, context: f64| {
        number("decode_ms_base") + batch * number("decode_ms_per_sequence") + context * number("decode_ms_per_context_token")
    };
    near(step(1.0, 100.0), 24.0);
    near(step(16.0, 1600.0), 84.0);

    // The file is a worker's labels.
    let host = Host::start(&["--worker", &format!("{},profile={file}", engine.url())]).await;
    host.activate(&components::policy("composed"), &json!({})).await;
    host.serves(3).await;
}

#[tokio::test]
async fn what_cannot_be_measured_or_is_no_profile_says_why() {
    run(&["profile", "http://127.0.0.1:1"]).await.failed(1, &["cannot connect"]);
    run(&["profile", "127.0.0.1:1"]).await.failed(1, &["does not begin with a URL"]);
    run(&["profile", "http://127.0.0.1:1", "--kind", "ollama"]).await.failed(1, &["use one of vllm"]);
    let refusing = Scripted::answering(whole_answer("400 Bad Request", r#"{"error":{"message":"no completions here"}}"#)).await;
    run(&["profile", &refusing.url()]).await.failed(1, &["no completions here"]);
    let serve = ["serve", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--worker", "http://127.0.0.1:1,profile=/none.json"];
    run(&serve).await.failed(2, &["/none.json", "cannot be read", "dynamo-host profile URL"]);
}

#[tokio::test]
async fn a_mock_engines_profile_is_read_by_policies_as_signals() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().to_str().unwrap();
    let config = "[receipts]\ncolumns = 'all'\n";
    let arguments = ["--worker", "mock://a?model=m&speedup=50&decode_ms_base=10", "--state-dir", state];
    let host = Host::configured(config, &arguments).await;
    host.serves(3).await;
    let line = eventually("the receipt is written", async || {
        let export = run(&["receipts", "export", "--state-dir", state]).await;
        export.stdout.lines().next().map(|line| serde_json::from_str::<Value>(line).unwrap())
    })
    .await;
    assert_eq!(line["labels"]["profile.decode_ms_base"], json!(["0.2"]), "{line}");
    assert!(line["columns"].get("kv-tokens-free").is_some(), "all columns are there: {line}");
}
