//! Receipts of requests whose prefill and decode are apart: each is a decision, and can be decided again.

use std::path::Path;

use serde_json::{Value, json};

use super::mocks::{CHAT, Pools, long};
use crate::harness::{
    components, eventually,
    host::{chat, streamed},
    process::run,
};

async fn lines(state: &Path, kind: &str) -> Vec<Value> {
    if !state.join("receipts").is_dir() {
        return Vec::new();
    }
    let all = run(&["receipts", "export", "--state-dir", state.to_str().unwrap()]).await;
    let lines = all.succeeded().lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["kind"] == kind).collect()
}

async fn replay(state: &Path, policy: &str) -> Value {
    let finished =
        run(&["policy", "replay", "--receipts", state.to_str().unwrap(), "--output", "json", "--policy", policy]).await;
    serde_json::from_str(finished.succeeded()).unwrap()
}

#[tokio::test]
async fn both_stages_are_recorded_by_who_tells_roles_apart_and_decided_again_alike() {
    const REQUESTS: usize = 6;
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path();
    let policy = components::policy("disagg-conditional");
    let pools = Pools::start(&["speedup=20"]).await;
    let host = pools.host(&["--routing", &policy, "--state-dir", state.to_str().unwrap()]).await;
    for number in 0..REQUESTS {
        let stream = host.http.stream(CHAT, &streamed(long(chat(9), number))).await;
        assert!(stream.headers.contains_key("x-dynamo-prefill-worker"), "nothing of it was held where it is decoded");
    }
    let decisions = eventually("both decisions of each request are written", async || {
        let decisions = lines(state, "decision").await;
        (decisions.len() == 2 * REQUESTS).then_some(decisions)
    })
    .await;
    for request in decisions.chunks(2) {
        let [begun, goes_on] = request else { unreachable!("they are pairs") };
        assert_eq!((begun["facts"].get("stage"), &goes_on["facts"]["stage"]), (None, &json!("decode")));
        assert_eq!(begun["request"], goes_on["request"]);
        assert_eq!(begun["done"]["place"][0], goes_on["facts"]["prefilled_by"]);
        let roles = |decision: &Value| {
            let mut roles = decision["columns"]["role"].as_array().cloned().unwrap_or_default();
            roles.sort_by_key(Value::as_u64);
            roles
        };
        assert_eq!(roles(begun), [1, 1, 2, 2].map(Value::from), "{begun}");
        assert_eq!(goes_on["columns"]["role"], 2, "all of them decode: {goes_on}");
        let reachable = |link: &Value| link["column"] == "reachable";
        assert!(
            begun["links"].as_array().unwrap().iter().any(|link| reachable(link) && link["from"] == begun["done"]["place"][0])
        );
        assert!(goes_on["links"].as_array().unwrap().iter().any(|link| reachable(link) && link.get("from").is_none()));
    }
    let own = replay(state, &policy).await;
    assert_eq!(own["total"]["decisions"], 2 * REQUESTS);
    assert_eq!(own["total"]["same_first"], own["total"]["decisions"], "{own}");
    assert_eq!(own["not_held"], json!({}), "{own}");
    let blind = replay(state, &components::policy("kv-aware")).await;
    assert_eq!(blind["total"]["decisions"], 2 * REQUESTS, "it is put to it as it begins: {blind}");
    assert_eq!(blind["faults"], json!({}));
    let native = replay(state, "native").await;
    assert_eq!(native["total"]["decisions"], 2 * REQUESTS, "{native}");
    let told = run(&["receipts", "tail", "--state-dir", state.to_str().unwrap()]).await;
    assert!(
        told.succeeded().lines().filter(|line| line.contains(" decode  disagg-conditional@")).count() == REQUESTS,
        "{told:?}"
    );
}
