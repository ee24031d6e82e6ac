//! CORS: web pages of configured origins may ask the front door; without the section, none may.

use hyper::{Method, StatusCode};

use crate::harness::host::{Host, chat};

const CHAT: &str = "/v1/chat/completions";
const MOCK: &str = "mock://a?model=m&speedup=50";
const PAGE: &str = "https://chat.example.org";

fn preflight(origin: &str) -> [(&str, &str); 3] {
    [
        ("origin", origin),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,content-type"),
    ]
}

#[tokio::test]
async fn a_configured_page_may_ask_and_read_the_answer() {
    let config = format!("[cors]\norigins = [\"{PAGE}\", \"https://b.example.org\"]\nmax_age_s = 99\n");
    let host = Host::configured(&config, &["--worker", MOCK, "--expose-worker"]).await;
    let reply = host.http.send(Method::OPTIONS, CHAT, &preflight(PAGE), "").await;
    assert!(reply.status.is_success(), "{}", reply.status);
    assert_eq!(reply.header("access-control-allow-origin"), PAGE);
    assert!(reply.header("access-control-allow-methods").contains("POST"));
    assert!(reply.header("access-control-allow-headers").contains("authorization"));
    assert_eq!(reply.header("access-control-max-age"), "99");

    for body in [chat(2).to_string(), "{".to_owned()] {
        let reply = host.http.send(Method::POST, CHAT, &[("origin", PAGE)], body).await;
        assert_eq!(reply.header("access-control-allow-origin"), PAGE);
        let exposed = reply.header("access-control-expose-headers");
        let exposed: Vec<_> = exposed.split(',').map(str::trim).collect();
        for name in ["x-request-id", "policy", "worker", "prefill-worker", "model", "queue-ms"] {
            assert!(exposed.iter().any(|it| *it == name || *it == format!("x-dynamo-{name}")), "{name}: {exposed:?}");
        }
        assert!(reply.header("vary").contains("origin"), "{:?}", reply.headers);
    }
}

#[tokio::test]
async fn another_page_may_not_and_nobody_may_without_the_section() {
    let config = format!("[cors]\norigins = [\"{PAGE}\"]\n");
    let host = Host::configured(&config, &["--worker", MOCK]).await;
    let reply = host.http.send(Method::OPTIONS, CHAT, &preflight("https://evil.example"), "").await;
    assert_eq!(reply.header("access-control-allow-origin"), "");
    let host = Host::start(&["--worker", MOCK]).await;
    let reply = host.http.send(Method::OPTIONS, CHAT, &preflight(PAGE), "").await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (StatusCode::METHOD_NOT_ALLOWED, ""));
    // The admin API takes no page's requests at all, whatever the front door does.
    let host = Host::configured("[cors]\norigins = [\"*\"]\n", &["--worker", MOCK]).await;
    let reply = host.http.send(Method::POST, CHAT, &[("origin", PAGE)], chat(1).to_string()).await;
    assert_eq!(reply.header("access-control-allow-origin"), "*");
    host.admin.send(Method::GET, "/v1/status", &[("origin", PAGE)], "").await.is_error(403, "origin");
}
