//! What is refused before it can decide anything: files that are no policy, settings that a policy does not take, callers
//! without the token. The active policy stays, and the refusal says what to do.

use std::fs;

use hyper::{Method, StatusCode};
use serde_json::json;

use crate::harness::{
    client::Client,
    components,
    host::Host,
    process::{Process, dynamo_host, run, serve},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");

#[tokio::test]
async fn what_is_no_policy_is_refused_by_api_and_command_and_the_active_one_stays() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    host.activate(&components::policy("round-robin"), &json!({})).await;
    let directory = tempfile::tempdir().unwrap();
    for (cause, says) in components::REFUSED {
        let bytes = components::refused(cause);
        let file = directory.path().join(format!("{cause}.wasm"));
        fs::write(&file, &bytes).unwrap();
        let file = file.to_str().unwrap();

        let message = host.put_policy(bytes, "{}").await.is_error(422, cause);
        assert!(message.contains(says), "{cause}: {message}");
        host.cli(&["policy", "activate", "routing", file]).await.failed(1, &[says]);
        run(&["policy", "check", file]).await.failed(1, &[says]);
        let counted = host.http.metric("dynamo_host_policy_load_failures_total", &[("cause", cause)]).await;
        assert_eq!(counted, 2.0, "{cause}");
    }
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), format!("round-robin@{VERSION}"));
    assert_eq!(host.slot().await["previous"].as_array().unwrap().len(), 1, "a refusal is no change");
    host.is_well().await;
}

#[tokio::test]
async fn a_policy_that_fails_before_its_first_request_is_refused() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    for (mode, cause, says) in
        [("trap-in-configure", "start", "configured to panic in configure"), ("trap-always", "probe", "configured to panic")]
    {
        let bytes = fs::read(components::guest("hostile")).unwrap();
        let message = host.put_policy(bytes, &json!({ "mode": mode }).to_string()).await.is_error(422, cause);
        assert!(message.contains(says), "{message}");
    }
    assert_eq!(host.active().await, "native");
    host.is_well().await;
}

#[tokio::test]
async fn settings_that_a_policy_refuses_leave_the_old_ones_active() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let file = components::policy("least-loaded");
    host.activate(&file, &json!({ "request": 8.0 })).await;
    for (settings, cause, says) in [
        (r#"{"prefil_token": 1}"#, "settings", "prefill_token"),
        (r#"{"request": -1}"#, "settings", "request is -1"),
        (r#"{"request": "much"}"#, "settings", "\"much\""),
        ("[]", "settings-syntax", "object"),
        ("{", "settings-syntax", "object"),
    ] {
        let message = host.put_policy(fs::read(&file).unwrap(), settings).await.is_error(422, cause);
        assert!(message.contains(says), "{settings}: {message}");
        host.cli(&["policy", "activate", "routing", &file, "--settings", settings]).await.failed(1, &[says]);
    }
    let slot = host.slot().await;
    assert_eq!(slot["active"]["settings"], json!({ "request": 8.0 }));
    assert_eq!(slot["previous"].as_array().unwrap().len(), 1);
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), format!("least-loaded@{VERSION}"));
}

#[tokio::test]
async fn a_flag_that_names_no_policy_is_said_clearly_and_native_serves() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("policy.wasm");
    for (cause, says) in components::REFUSED {
        fs::write(&file, components::refused(cause)).unwrap();
        let host = Host::over_mocks(&["a"], "speedup=50", &["--routing", file.to_str().unwrap()]).await;
        assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "native", "{cause}");
        host.process.logs(says).await;
    }
    let host = Host::over_mocks(&["a"], "speedup=50", &["--routing", "/nowhere/policy.wasm"]).await;
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "native");
    host.process.logs("/nowhere/policy.wasm").await;
    let file = components::policy("least-loaded");
    let refused = ["--routing", &file, "--routing-settings", r#"{"request": -1}"#];
    let host = Host::over_mocks(&["a"], "speedup=50", &refused).await;
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "native");
    host.process.logs("request is -1").await;
}

#[tokio::test]
async fn settings_that_are_no_json_are_refused_before_anything_listens() {
    let file = components::policy("least-loaded");
    for (settings, says) in
        [("{", "--routing-settings"), ("[1]", "--routing-settings"), ("@/nowhere/settings.json", "/nowhere/settings.json")]
    {
        let finished = run(&serve(&["--routing", &file, "--routing-settings", settings])).await;
        finished.failed(2, &[says]);
        assert!(!finished.stdout.contains("listening"), "{}", finished.stdout);
    }
    run(&serve(&["--routing-settings", "{}"])).await.failed(2, &["--routing FILE.wasm"]);
}

#[tokio::test]
async fn an_unknown_slot_is_answered_with_those_that_exist() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let bytes = fs::read(components::policy("round-robin")).unwrap();
    let reply = host.admin.send(Method::PUT, "/v1/slots/rooting/policy", &[], bytes).await;
    assert_eq!(reply.status, StatusCode::NOT_FOUND, "{}", reply.text());
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("routing"), "{}", reply.text());
    let reply = host.admin.send(Method::POST, "/v1/slots/rooting/rollback", &[], "").await;
    assert_eq!(reply.status, StatusCode::NOT_FOUND, "{}", reply.text());
    host.cli(&["policy", "activate", "rooting", "native"]).await.failed(1, &["rooting", "routing"]);
}

#[tokio::test]
async fn without_the_token_nobody_is_let_in() {
    let mut host = Process::start("dynamo-host serve", &mut dynamo_host(&serve(&["--admin-token", "a-secret"])));
    host.listener("front door listening on http://").await;
    let admin = host.listener("admin listening on http://").await;
    let strangers = Client::new(&admin);
    for client in
        [strangers.clone(), strangers.with_token("a-secre"), strangers.with_token("a-secret2"), strangers.with_token("")]
    {
        for (method, path) in [
            (Method::GET, "/v1/slots"),
            (Method::GET, "/v1/status"),
            (Method::PUT, "/v1/slots/routing/policy"),
            (Method::DELETE, "/v1/slots/routing/policy"),
            (Method::POST, "/v1/slots/routing/rollback"),
        ] {
            let reply = client.send(method.clone(), path, &[], "").await;
            assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{method} {path}: {}", reply.text());
            assert!(!reply.json()["error"]["message"].as_str().unwrap().is_empty());
        }
    }
    let friend = strangers.with_token("a-secret");
    assert_eq!(friend.get("/v1/slots").await.status, StatusCode::OK);
    run(&["policy", "list", "--admin", &admin]).await.failed(1, &["token"]);
    run(&["policy", "list", "--admin", &admin, "--token", "wrong"]).await.failed(1, &["token"]);
    run(&["policy", "list", "--admin", &admin, "--token", "a-secret"]).await.succeeded();
    assert!(!host.log().contains("a-secret"), "a secret in the log");
}

#[tokio::test]
async fn web_pages_are_not_let_in() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    for (method, path) in [(Method::DELETE, "/v1/slots/routing/policy"), (Method::GET, "/v1/status")] {
        let reply = host.admin.send(method, path, &[("origin", "http://a-page.example")], "").await;
        assert!(reply.is_error(403, "origin").contains("web pages"), "{}", reply.text());
    }
}
