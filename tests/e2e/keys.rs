//! API keys: who is let in, what is said to those who are not, and how a running host learns of changes.

use std::{fs, io::Write as _, path::PathBuf};

use hyper::Method;
use serde_json::json;
use tokio::io::AsyncWriteExt as _;

use crate::harness::{
    client::Client,
    components, eventually,
    host::{Host, chat, completion},
    process::run,
    replace,
    scripted::{Scripted, whole_answer},
    soon,
};

const CHAT: &str = "/v1/chat/completions";
const MOCK: &str = "mock://a?model=m&speedup=50";

/// A file of keys, as an operator keeps one.
struct KeysFile {
    directory: tempfile::TempDir,
}

impl KeysFile {
    fn new() -> Self {
        let file = Self { directory: tempfile::tempdir().unwrap() };
        fs::write(file.path(), "").unwrap();
        file
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("keys.toml")
    }

    /// Has a key made and adds its lines: `dynamo-host key new TENANT >> keys.toml`.
    async fn add(&self, arguments: &[&str]) -> String {
        let made = run(&[&["key", "new"], arguments].concat()).await;
        let lines = made.succeeded();
        let mut file = fs::OpenOptions::new().append(true).open(self.path()).unwrap();
        file.write_all(lines.as_bytes()).unwrap();
        let key = made.stderr.trim().to_owned();
        assert!(key.starts_with("dh-") && !lines.contains(&key), "{lines}");
        key
    }

    async fn host(&self, more: &[&str]) -> Host {
        let path = self.path();
        Host::start(&[&["--keys", path.to_str().unwrap()], more].concat()).await
    }
}

#[tokio::test]
async fn without_a_key_nobody_is_let_in_and_each_is_told_in_their_own_shape() {
    let keys = KeysFile::new();
    keys.add(&["acme"]).await;
    let routing = components::policy("round-robin");
    let host = keys.host(&["--worker", MOCK, "--routing", &routing]).await;
    for path in [CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"] {
        for (header, code, kind) in
            [(None, "missing_api_key", ""), (Some("Bearer dh-wrong"), "invalid_api_key", "error=\"invalid_token\"")]
        {
            let headers: Vec<_> = header.iter().map(|&value| ("authorization", value)).collect();
            let reply = host.http.send(Method::POST, path, &headers, chat(1).to_string()).await;
            let challenge = reply.header("www-authenticate");
            assert!(challenge.starts_with("Bearer ") && challenge.contains(kind), "{path}: {challenge}");
            if path.starts_with("/v1/messages") {
                assert_eq!((reply.status.as_u16(), &reply.json()["error"]["type"]), (401, &json!("authentication_error")));
            } else {
                reply.is_error(401, code);
            }
            assert!(!reply.header("x-request-id").is_empty());
        }
    }
    host.http.get("/v1/models").await.is_error(401, "missing_api_key");
    host.http.get("/v1/models/m").await.is_error(401, "missing_api_key");
    for open in ["/health", "/live", "/ready", "/metrics"] {
        assert_eq!(host.http.get(open).await.status, 200, "{open}");
    }
    // No policy heard of them.
    assert_eq!(host.http.metric("dynamo_host_policy_calls_total", &[]).await, 0.0);
    assert_eq!(host.http.metric("dynamo_host_requests_total", &[("code", "401"), ("model", "none")]).await, 12.0);
}

#[tokio::test]
async fn whoever_has_no_key_is_told_so_before_their_body_is_there() {
    let keys = KeysFile::new();
    let host = keys.host(&["--worker", MOCK]).await;
    let mut socket = host.http.socket().await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: 1000000\r\n\r\n{{");
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !String::from_utf8_lossy(&answer).contains("missing_api_key") {
        let read = soon("an answer", tokio::io::AsyncReadExt::read_buf(&mut socket, &mut answer)).await.unwrap();
        assert!(read > 0, "{}", String::from_utf8_lossy(&answer));
    }
    assert!(answer.starts_with(b"HTTP/1.1 401"));
}

#[tokio::test]
async fn a_key_says_whose_request_it_is_and_how_soon_and_stays_in_the_host() {
    let keys = KeysFile::new();
    let key = keys.add(&["acme", "--priority", "-7"]).await;
    let host = keys.host(&["--worker", MOCK]).await;
    host.activate(&components::guest("hostile"), &json!({ "mode": "gossip" })).await;
    let bearer = format!("bearer {key}");
    for header in [("authorization", bearer.as_str()), ("x-api-key", key.as_str())] {
        let reply = host.http.send(Method::POST, CHAT, &[header, ("x-tenant", "evil")], chat(13).to_string()).await;
        let message = reply.is_error(403, "policy_rejected");
        assert_eq!(message, "acme asks 0 with priority -7");
    }
    assert!(!host.process.log().contains(&key), "a key in the log");

    let engine = Scripted::answering(whole_answer("200 OK", r#"{"choices":[]}"#)).await;
    let host = keys.host(&["--worker", &engine.worker()]).await;
    for header in [("authorization", bearer.as_str()), ("x-api-key", key.as_str())] {
        assert_eq!(host.http.send(Method::POST, CHAT, &[header], chat(1).to_string()).await.status, 200);
    }
    assert!(engine.received().iter().all(|received| !received.head.contains(&key) && !received.head.contains("authorization")));
}

#[tokio::test]
async fn a_key_sees_and_uses_the_models_that_it_may() {
    let keys = KeysFile::new();
    let some = keys.add(&["a", "--model", "small-*", "--model", "big"]).await;
    let all = keys.add(&["b"]).await;
    let workers = ["mock://a?model=small-1&speedup=50", "mock://b?model=big&speedup=50", "mock://c?model=bigger&speedup=50"];
    let host = keys.host(&workers.iter().flat_map(|worker| ["--worker", worker]).collect::<Vec<_>>()).await;
    let models = async |key: &str| {
        let list = host.http.with_token(key).get_json("/v1/models").await;
        let mut ids: Vec<_> =
            list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect();
        ids.sort();
        ids
    };
    assert_eq!(models(&some).await, ["big", "small-1"]);
    assert_eq!(models(&all).await, ["big", "bigger", "small-1"]);
    let asks = async |key: &str, model: &str| {
        let mut asked = completion(2);
        asked["model"] = model.into();
        host.http.with_token(key).post("/v1/completions", asked.to_string()).await
    };
    assert_eq!(asks(&some, "small-1").await.status, 200);
    // Whether there is such a model is not told.
    for model in ["bigger", "no-such-model"] {
        let message = asks(&some, model).await.is_error(403, "model_not_allowed");
        assert!(message.contains(model) && message.contains("/v1/models"), "{message}");
    }
    assert_eq!(asks(&all, "bigger").await.status, 200);
    host.http.with_token(&some).get("/v1/models/bigger").await.is_error(404, "model_not_found");
    assert_eq!(host.http.with_token(&some).get("/v1/models/big").await.status, 200);
}

#[tokio::test]
async fn a_running_host_learns_of_new_and_revoked_keys_and_keeps_what_it_has_if_it_cannot() {
    let keys = KeysFile::new();
    let first = keys.add(&["first"]).await;
    let host = keys.host(&["--worker", MOCK]).await;
    let status = async |key: &str| host.http.with_token(key).get("/v1/models").await.status.as_u16();
    assert_eq!(status(&first).await, 200);
    let second = keys.add(&["second"]).await;
    eventually("the new key is let in", async || (status(&second).await == 200).then_some(())).await;

    let good = fs::read_to_string(keys.path()).unwrap();
    replace(&keys.path(), &format!("{good}[[key]]\ntenant = 7\n"));
    host.process.logs("what was read before stays in force").await;
    assert_eq!((status(&first).await, status(&second).await), (200, 200));
    assert_eq!(host.http.metric("dynamo_host_reload_failures_total", &[("what", "API keys")]).await, 1.0);

    let revoked = good.split_inclusive("[[key]]").nth(2).map(|second| format!("[[key]]{second}")).unwrap();
    replace(&keys.path(), &revoked);
    eventually("the revoked key is refused", async || (status(&first).await == 401).then_some(())).await;
    assert_eq!(status(&second).await, 200);
}

#[tokio::test]
async fn a_key_ends_when_it_should() {
    let keys = KeysFile::new();
    let over = keys.add(&["a", "--expires", "2020-01-01"]).await;
    let not_yet = keys.add(&["a", "--expires", "2920-01-01T00:00:00Z"]).await;
    let host = keys.host(&["--worker", MOCK]).await;
    host.http.with_token(&over).get("/v1/models").await.is_error(401, "expired_api_key");
    assert_eq!(host.http.with_token(&not_yet).get("/v1/models").await.status, 200);
    run(&["key", "new", "a", "--expires", "tomorrow"]).await.failed(2, &["--expires"]);
    run(&["key", "new", "a", "--expires", "12:00:00"]).await.failed(1, &["write a date"]);
    run(&["key", "new", ""]).await.failed(1, &["tenant"]);
    run(&["key", "new", "a", "--expires", "2920-01-01T00:00:00"]).await.failed(1, &["offset"]);
}

#[tokio::test]
async fn a_keys_file_that_cannot_be_used_is_refused_at_the_start() {
    let keys = KeysFile::new();
    fs::write(keys.path(), "[[key]]\nsha256 = \"abc\"\ntenant = \"t\"\n").unwrap();
    let path = keys.path();
    let start = ["serve", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--worker", MOCK, "--keys"];
    run(&[&start[..], &[path.to_str().unwrap()]].concat()).await.failed(2, &["keys.toml", "64 hexadecimal digits"]);
    run(&[&start[..], &["/nowhere/keys.toml"]].concat()).await.failed(2, &["/nowhere/keys.toml", "cannot be read"]);
}

#[tokio::test]
async fn a_gateways_header_names_the_tenant_where_it_is_configured() {
    let gossip = json!({ "mode": "gossip" });
    let says = async |host: &Host| {
        host.activate(&components::guest("hostile"), &gossip).await;
        let reply = host.http.send(Method::POST, CHAT, &[("x-tenant", "acme")], chat(13).to_string()).await;
        reply.is_error(403, "policy_rejected")
    };
    let host = Host::configured("[auth]\ntenant_header = \"x-tenant\"\n", &["--worker", MOCK]).await;
    assert!(says(&host).await.starts_with("acme asks"));
    let host = Host::start(&["--worker", MOCK]).await;
    assert!(says(&host).await.starts_with("nobody asks"));
    let client: &Client = &host.http;
    assert_eq!(client.get("/v1/models").await.status, 200);
}
