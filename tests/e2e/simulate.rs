//! `dynamo-host simulate` as a user meets it.

use std::fs;

use serde_json::{Value, json};

use crate::harness::{components, process::run};

const TRACE: &str = concat!(
    "{\"timestamp\": 0, \"input_length\": 1024, \"output_length\": 5, \"hash_ids\": [1, 2]}\n",
    "{\"timestamp\": 9000, \"input_length\": 1500, \"output_length\": 5, \"hash_ids\": [1, 2, 3]}\n",
);

#[tokio::test]
async fn policies_stand_side_by_side_and_the_same_seed_writes_the_same_files() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (trace, settings) = (at("trace.jsonl"), at("settings.json"));
    fs::write(&trace, TRACE).unwrap();
    fs::write(&settings, r#"{"prefill_token": 2.0}"#).unwrap();
    let round_robin = format!("routing={}", components::policy("round-robin"));
    let least_loaded = format!("routing={},@{settings}", components::policy("least-loaded"));
    for nth in ["1", "2"] {
        let (json, html) = (at(&format!("{nth}.json")), at(&format!("{nth}.html")));
        let policies = ["--policy", "routing=native", "--policy", &round_robin, "--policy", &least_loaded];
        let more = ["--workers", "1,kv_blocks=4096", "--json", &json, "--html", &html];
        let finished = run(&[&["simulate", "--trace", &trace], &policies[..], &more].concat()).await;
        for part in
            ["native", "round-robin", "least-loaded {\"prefill_token\":2.0}", "bound: pooled LRU", "4096 blocks of 64 tokens"]
        {
            assert!(finished.succeeded().contains(part), "{part}: {}", finished.stdout);
        }
        assert_eq!(finished.stderr, "");
    }
    for kind in ["json", "html"] {
        assert_eq!(fs::read(at(&format!("1.{kind}"))).unwrap(), fs::read(at(&format!("2.{kind}"))).unwrap(), "{kind}");
    }
    let report: Value = serde_json::from_slice(&fs::read(at("1.json")).unwrap()).unwrap();
    let rows = report["policies"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    for row in rows {
        // One worker: whoever decides, the second request finds 1,024 of its tokens, and the first none.
        assert_eq!((&row["served"], row["reuse"].as_f64()), (&Value::from(2), Some(1024.0 / 2524.0)));
        assert_eq!(row["ttft"]["mean"], report["bounds"]["pooled"]["ttft"]["mean"]);
    }
}

#[tokio::test]
async fn prefill_and_decode_pools_hand_kv_over_and_the_report_says_how_much() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let trace = at("trace.jsonl");
    fs::write(&trace, TRACE).unwrap();
    let conditional = format!("routing={}", components::policy("disagg-conditional"));
    for nth in ["1", "2"] {
        let (json, html) = (at(&format!("{nth}.json")), at(&format!("{nth}.html")));
        let fleet = ["--workers", "1,role=prefill", "--workers", "1,role=decode", "--audit-every", "1"];
        let links = ["--link-bandwidth", "1", "--link-latency-ms", "20"];
        let policies = ["--policy", "routing=native", "--policy", &conditional];
        let more = ["--json", &json, "--html", &html];
        let finished = run(&[&["simulate", "--trace", &trace], &fleet[..], &links, &policies, &more].concat()).await;
        for part in ["2 workers (1 prefill, 1 decode)", "hand-offs", "GB moved", "pools", "disagg-conditional"] {
            assert!(finished.succeeded().contains(part), "{part}: {}", finished.stdout);
        }
        assert!(fs::read_to_string(&html).unwrap().contains("<th>hand-off mean</th>"));
    }
    for kind in ["json", "html"] {
        assert_eq!(fs::read(at(&format!("1.{kind}"))).unwrap(), fs::read(at(&format!("2.{kind}"))).unwrap(), "{kind}");
    }
    let report: Value = serde_json::from_slice(&fs::read(at("1.json")).unwrap()).unwrap();
    let row = &report["policies"][0];
    let handoffs = &row["handoffs"];
    // The second prompt has 1,024 of its tokens in both caches: 476 are fetched, in 8 blocks of 64.
    assert_eq!((&row["served"], row["reuse"].as_f64()), (&Value::from(2), Some(1024.0 / 2524.0)));
    assert_eq!((&handoffs["transfers"], &handoffs["fetched_tokens"]), (&Value::from(2), &Value::from(1500)));
    assert_eq!(handoffs["bytes"], (1024 + 512) * 131_072);
    assert_eq!(handoffs["remote_share"], 1.0);
    // A gigabyte a second, and 20 ms each time.
    let transfer_ms = handoffs["transfer"]["mean"].as_f64().unwrap();
    assert!((transfer_ms - (768.0 * 0.131_072 + 20.0)).abs() < 0.01, "{transfer_ms}");
    // The first token comes after them.
    let mean = |of: &Value| of["mean"].as_f64().unwrap();
    let handed_over = mean(&report["bounds"]["pooled"]["ttft"]) + mean(&handoffs["handoff"]);
    assert!((mean(&row["ttft"]) - handed_over).abs() < 0.01, "{row}");
    let roles: Vec<_> = row["pools"].as_array().unwrap().iter().map(|pool| (&pool["role"], &pool["legs"])).collect();
    assert_eq!(roles, [(&Value::from("prefill"), &Value::from(2)), (&Value::from("decode"), &Value::from(2))]);
    let of = &report["policies"][1]["handoffs"];
    let shares = ["remote_share", "local_share", "aggregated_share"].map(|share| of[share].as_f64().unwrap());
    assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{of}");
}

#[tokio::test]
async fn the_report_names_what_let_requests_in() {
    let directory = tempfile::tempdir().unwrap();
    let json = directory.path().join("report.json").to_str().unwrap().to_owned();
    let bucket = format!("admission={},{{\"tenants\":{{}}}}", components::policy("token-bucket"));
    let more = ["--queue", "--policy", "routing=native", "--json", &json];
    let finished = run(&[&["simulate", "--trace", "synthetic:requests=3", "--policy", &bucket], &more[..]].concat()).await;
    let label = format!("token-bucket@{}", env!("CARGO_PKG_VERSION"));
    let said = format!("let in by token-bucket {{\"tenants\":{{}}}} ({label})");
    assert!(finished.succeeded().contains(&said), "{}", finished.stdout);
    let report: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let named = json!({ "name": "token-bucket {\"tenants\":{}}", "policy": label });
    assert_eq!(report["policies"][0]["queue"]["admission"], named);
    let without = run(&["simulate", "--trace", "synthetic:requests=3", "--queue", "--output", "json"]).await;
    let report: Value = serde_json::from_str(without.succeeded()).unwrap();
    assert!(report["policies"][0]["queue"]["tenants"].is_array() && report["policies"][0]["queue"]["admission"].is_null());
}

#[tokio::test]
async fn what_cannot_be_simulated_is_refused_with_what_to_change() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken.jsonl");
    fs::write(&broken, format!("{TRACE}{{\"timestamp\": 9000}}\n")).unwrap();
    let broken = broken.to_str().unwrap();
    let refuses = async |arguments: &[&str], says: &[&str]| {
        run(&[&["simulate"], arguments].concat()).await.failed(1, says);
    };
    refuses(&["--trace", broken], &["line 3", "input_length", "a line is {\"timestamp\": MILLISECONDS"]).await;
    refuses(&["--trace", "/nowhere"], &["/nowhere", "Mooncake JSONL"]).await;
    let small = "synthetic:requests=1";
    refuses(&["--trace", small, "--policy", "routing=/nowhere.wasm"], &["/nowhere.wasm", "cannot be read"]).await;
    refuses(&["--trace", small, "--policy", "native"], &["use routing=native"]).await;
    refuses(&["--trace", small, "--policy", "admission=native"], &["admission is before a queue; add --queue"]).await;
    let settings = format!("routing={},{{\"colour\": 1}}", components::policy("least-loaded"));
    refuses(&["--trace", small, "--policy", &settings], &["least-loaded", "colour"]).await;
    refuses(&["--trace", small, "--workers", "none"], &["begin with a number"]).await;
    refuses(&["--trace", small, "--workers", "2,colour=1"], &["\"colour\" is not known"]).await;
    refuses(&["--trace", small, "--workers", "2,role=cook"], &["role \"cook\" is not known; use aggregated, prefill"]).await;
    refuses(&["--trace", small, "--workers", "2,role=prefill"], &["2 workers have the role prefill", "--workers 2,role=decode"])
        .await;
    let pair = ["--workers", "1,role=prefill", "--workers", "1,role=decode,block_size=32,kv_blocks=32768"];
    refuses(&[&["--trace", small], &pair[..]].concat(), &["block_size=64", "give both the same"]).await;
    refuses(&["--trace", small, "--link-bandwidth", "0"], &["--link-bandwidth 0: use GB a second"]).await;
    refuses(&["--trace", small, "--link-latency-ms=-1"], &["--link-latency-ms -1: use milliseconds"]).await;
    refuses(&["--trace", small, "--kv-blocks", "10"], &["raise kv_blocks or lower max_model_len"]).await;
    refuses(&["--trace", small, "--speed", "0"], &["use a number above 0"]).await;
    refuses(&["--trace", small, "--queue", "depth=1"], &["--queue depth=1", "\"depth\" is not known; use max_requests"]).await;
    refuses(&["--trace", small, "--queue", "--tenant", "a,weight=0"], &["--tenant a,weight=0", "no weight from 0.001"]).await;
    refuses(&["--trace", small, "--faults", "attempts=0"], &["--faults attempts=0", "whole number of 1 to 1000"]).await;
    refuses(&["--trace", small, "--engine-profile", "/nowhere"], &["--engine-profile /nowhere"]).await;
}
