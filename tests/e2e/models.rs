//! Names of models: adapters, aliases, fallbacks, and what is listed of them.

use std::fs;

use hyper::StatusCode;
use serde_json::{Value, json};

use crate::harness::{
    eventually,
    host::{Host, completion},
    process::{run, serve},
    scripted::{Scripted, whole_answer},
};

const COMPLETIONS: &str = "/v1/completions";

fn asked(model: &str) -> Value {
    let mut body = completion(2);
    body["model"] = model.into();
    body
}

/// An engine that lists models, `ADAPTER@BASE` for an adapter, and answers each request with nothing much.
async fn engine(models: &[&str]) -> Scripted {
    let cards: Vec<Value> = models
        .iter()
        .map(|model| {
            let (id, parent) = model.split_once('@').map_or((*model, None), |(id, parent)| (id, Some(parent)));
            json!({ "id": id, "object": "model", "parent": parent, "max_model_len": parent.is_none().then_some(4096) })
        })
        .collect();
    let answer = whole_answer("200 OK", r#"{"choices":[]}"#);
    Scripted::listing(json!({ "object": "list", "data": cards }), move |mut connection| {
        let answer = answer.clone();
        async move { connection.write(answer).await }
    })
    .await
}

/// Models of `GET /v1/models`, as id, root, parent.
async fn listed(host: &Host) -> Vec<(String, String, Option<String>)> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let models = host.http.get_json("/v1/models").await;
    let models = models["data"].as_array().unwrap();
    models.iter().map(|it| (text(&it["id"]).unwrap(), text(&it["root"]).unwrap(), text(&it["parent"]))).collect()
}

#[tokio::test]
async fn an_adapter_is_served_by_the_workers_that_have_it_loaded() {
    let (with, without) = (engine(&["m", "sql@m"]).await, engine(&["m"]).await);
    let host = Host::start(&["--worker", &with.url(), "--worker", &without.url()]).await;
    for _ in 0..6 {
        let reply = host.http.ask(COMPLETIONS, &asked("sql")).await;
        assert_eq!(reply.header("x-dynamo-model"), "", "it is what was asked for");
    }
    assert_eq!((with.received().len(), without.received().len()), (6, 0));
    assert_eq!(with.received()[0].json()["model"], "sql");
    for _ in 0..10 {
        host.http.ask(COMPLETIONS, &asked("m")).await;
    }
    assert!(!without.received().is_empty(), "the base model is served by both");
    assert_eq!(without.received()[0].json()["model"], "m");
    let own = |name: &str, parent: Option<&str>| (name.to_owned(), name.to_owned(), parent.map(str::to_owned));
    assert_eq!(listed(&host).await, [own("m", None), own("sql", Some("m"))]);
    let list = host.cli(&["worker", "list"]).await;
    assert!(list.succeeded().contains("adapters sql"), "{}", list.stdout);
    assert_eq!(host.http.metric("dynamo_host_requests_total", &[("model", "m")]).await, 16.0);
}

#[tokio::test]
async fn an_alias_is_another_name_and_the_engine_sees_the_real_one() {
    let engine = engine(&["m", "sql@m"]).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    let text = format!("[models]\n\"gpt-4o\" = \"big\"\nbig = \"m\"\nquery = \"sql\"\n[[worker]]\nurl = \"{}\"\n", engine.url());
    fs::write(&file, text).unwrap();
    let host = Host::start(&["--config", file.to_str().unwrap()]).await;
    let body = r#"{"prompt":"hi", "model" : "gpt-4o","a_field":{"model":"gpt-4o"},"seed":1.50}"#;
    let reply = host.http.post(COMPLETIONS, body).await;
    assert_eq!((reply.status, reply.header("x-dynamo-model")), (StatusCode::OK, "m"));
    assert_eq!(engine.received()[0].body, r#"{"prompt":"hi","model":"m","a_field":{"model":"gpt-4o"},"seed":1.50}"#);
    let reply = host.http.ask(COMPLETIONS, &asked("query")).await;
    assert_eq!((reply.header("x-dynamo-model"), &engine.received()[1].json()["model"]), ("sql", &json!("sql")));
    let names: Vec<_> = listed(&host).await.into_iter().map(|(id, root, _)| (id, root)).collect();
    let expected = [("big", "m"), ("gpt-4o", "m"), ("m", "m"), ("query", "sql"), ("sql", "sql")];
    assert_eq!(names, expected.map(|(id, root)| (id.to_owned(), root.to_owned())));
    host.http.post(COMPLETIONS, asked("gpt-5").to_string()).await.is_error(404, "model_not_found");
}

#[tokio::test]
async fn a_fallback_serves_while_no_worker_of_a_model_is_ready() {
    let engine = engine(&["big"]).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    let text = format!(
        "[models]\nbig = {{ fallbacks = [\"none\", \"m\"] }}\ngpt = \"big\"\n[[worker]]\nurl = \"{}\"\nname = \"e\"\n\
         [[worker]]\nurl = \"mock://a?model=m&speedup=50\"\n",
        engine.url()
    );
    fs::write(&file, text).unwrap();
    let host = Host::start(&["--config", file.to_str().unwrap()]).await;
    assert_eq!(host.http.ask(COMPLETIONS, &asked("big")).await.header("x-dynamo-model"), "");
    host.cli(&["worker", "drain", "e"]).await.succeeded();
    for name in ["big", "gpt"] {
        let reply = host.http.ask(COMPLETIONS, &asked(name)).await;
        assert_eq!((reply.header("x-dynamo-model"), &reply.json()["model"]), ("m", &json!("m")));
    }
    let fallbacks = host.http.metric("dynamo_host_model_fallbacks_total", &[("model", "big"), ("to", "m")]).await;
    assert_eq!((fallbacks, engine.received().len()), (1.0, 1));
    host.cli(&["worker", "resume", "e"]).await.succeeded();
    assert_eq!(host.http.ask(COMPLETIONS, &asked("gpt")).await.header("x-dynamo-model"), "big");
    host.cli(&["worker", "drain", "e"]).await.succeeded();
    host.cli(&["worker", "drain", "a"]).await.succeeded();
    let message = host.http.post(COMPLETIONS, asked("gpt").to_string()).await.is_error(503, "no_worker");
    assert!(message.contains("\"big\""), "{message}");
}

#[tokio::test]
async fn an_adapter_that_is_loaded_later_is_served_then() {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    };
    // The list of models is asked for again and again; an engine in front of the real one says when it is another.
    let has_adapter = Arc::new(AtomicBool::new(false));
    let engine = engine(&["m", "sql@m"]).await;
    let plain = self::engine(&["m"]).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (targets, switch) = ((plain.address, engine.address), Arc::clone(&has_adapter));
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let target = if switch.load(Relaxed) { targets.1 } else { targets.0 };
            connections.spawn(async move {
                if let Ok(mut server) = tokio::net::TcpStream::connect(target).await {
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
    });
    let host = Host::start(&["--worker", &format!("http://{address}")]).await;
    host.http.post(COMPLETIONS, asked("sql").to_string()).await.is_error(404, "model_not_found");
    has_adapter.store(true, Relaxed);
    eventually("the adapter is listed", async || (listed(&host).await.len() == 2).then_some(())).await;
    host.http.ask(COMPLETIONS, &asked("sql")).await;
}

#[tokio::test]
async fn names_that_go_in_a_circle_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    fs::write(&file, "[models]\na = \"b\"\nb = \"a\"\n").unwrap();
    run(&serve(&["--config", file.to_str().unwrap()])).await.failed(2, &["a -> b -> a", "circle"]);
    fs::write(&file, "[models]\na = { fallback = [\"b\"] }\n").unwrap();
    run(&serve(&["--config", file.to_str().unwrap()])).await.failed(2, &["line 2", "fallbacks"]);
}
