//! Traces: the client's context goes on to the engine, and what is exported arrives at a real collector's address.

use hyper::Method;
use serde_json::Value;

use crate::harness::{
    client::Client,
    eventually,
    host::{Host, chat, streamed},
    process::{Process, dynamo_host, serve},
    scripted::{Received, Scripted, whole_answer},
};

const CHAT: &str = "/v1/chat/completions";
const MOCK: &str = "mock://a?model=m&speedup=50";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn traceparent(flags: &str) -> String {
    format!("00-{TRACE}-{PARENT}-{flags}")
}

async fn collector() -> Scripted {
    Scripted::answering(whole_answer("200 OK", "{}")).await
}

fn otlp(collector: &Scripted, more: &str) -> String {
    format!("[otlp]\nendpoint = \"{}\"\nprotocol = \"http/json\"\n{more}", collector.url())
}

/// All spans that arrived, waited for until one is named so.
async fn spans(collector: &Scripted, until: &str) -> Vec<Value> {
    eventually(&format!("a span {until:?} is exported"), async || {
        let all: Vec<Value> = collector.received().iter().flat_map(spans_of).collect();
        all.iter().any(|span| span["name"] == until).then_some(all)
    })
    .await
}

fn spans_of(export: &Received) -> Vec<Value> {
    assert!(export.head.starts_with("post /v1/traces http/1.1"), "{}", export.head);
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let resources = list(&export.json()["resourceSpans"]);
    resources.iter().flat_map(|resource| list(&resource["scopeSpans"])).flat_map(|scope| list(&scope["spans"])).collect()
}

/// An attribute's value, whatever its kind; null without it.
fn attribute(span: &Value, key: &str) -> Value {
    let all = span["attributes"].as_array().unwrap();
    let found = all.iter().find(|attribute| attribute["key"] == key);
    found.and_then(|attribute| attribute["value"].as_object()?.values().next().cloned()).unwrap_or_default()
}

const REQUEST: &str = "POST /v1/chat/completions";

#[tokio::test]
async fn a_request_is_exported_with_its_stages_and_never_its_words() {
    let collector = collector().await;
    let host = Host::configured(&otlp(&collector, "headers = { x-token = \"a-token\" }\n"), &["--worker", MOCK]).await;
    let mut asked = streamed(chat(9));
    asked["messages"][0]["content"] = "these are secret words".into();
    let headers = [("traceparent", traceparent("01")), ("tracestate", "a=1".to_owned())];
    let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    host.http.send(Method::POST, CHAT, &headers, asked.to_string()).await;

    let all = spans(&collector, REQUEST).await;
    let request = all.iter().find(|span| span["name"] == REQUEST).unwrap();
    assert_eq!((&request["traceId"], &request["parentSpanId"]), (&TRACE.into(), &PARENT.into()));
    for (key, value) in [
        ("gen_ai.request.model", "m"),
        ("dynamo_host.endpoint", "chat_completions"),
        ("dynamo_host.policy", "native"),
        ("dynamo_host.worker", "a"),
        ("http.response.status_code", "200"),
        ("gen_ai.usage.output_tokens", "9"),
    ] {
        let found = attribute(request, key);
        let found = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
        assert_eq!(found, value, "{key} of {request}");
    }
    assert!(attribute(request, "dynamo_host.ttft_ms").as_f64().is_some_and(|ms| ms > 0.0), "{request}");
    let moment = |span: &Value, end: &str| span[end].as_str().unwrap().parse::<u64>().unwrap();
    for stage in ["decode", "tokenize", "admission", "queue", "route", "dispatch", "relay"] {
        let span = all.iter().find(|span| span["name"] == stage).unwrap_or_else(|| panic!("no {stage} in {all:?}"));
        assert_eq!((&span["traceId"], &span["parentSpanId"]), (&TRACE.into(), &request["spanId"]));
        assert!(moment(span, "startTimeUnixNano") <= moment(span, "endTimeUnixNano"), "{span}");
        assert!(moment(span, "endTimeUnixNano") <= moment(request, "endTimeUnixNano") + 1_000_000, "{span} {request}");
    }
    assert_eq!(all.len(), 8, "{all:?}");
    for export in collector.received() {
        assert!(!export.body.contains("secret words"), "{}", export.body);
        assert!(export.head.contains("x-token: a-token") && export.body.contains("service.name"), "{}", export.head);
    }
}

#[tokio::test]
async fn an_engine_gets_our_span_as_its_parent_and_a_trace_begins_where_none_came() {
    let collector = collector().await;
    let engine = Scripted::answering(whole_answer("200 OK", r#"{"choices":[]}"#)).await;
    let host = Host::configured(&otlp(&collector, ""), &["--worker", &engine.worker()]).await;
    let sent = traceparent("01");
    host.http.send(Method::POST, CHAT, &[("traceparent", &sent), ("tracestate", "a=1")], chat(1).to_string()).await;
    host.http.post(CHAT, chat(1).to_string()).await;
    let head = |at: usize, name: &str| {
        let received = engine.received()[at].head.clone();
        received.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")).map(str::to_owned)).unwrap_or_default()
    };
    let all = eventually("both are exported", async || {
        let all: Vec<Value> = collector.received().iter().flat_map(spans_of).collect();
        (all.iter().filter(|span| span["name"] == REQUEST).count() == 2).then_some(all)
    })
    .await;
    let of = |trace: &str| all.iter().find(|span| span["name"] == REQUEST && span["traceId"] == trace).unwrap();
    let ours = of(TRACE)["spanId"].as_str().unwrap().to_owned();
    assert_eq!(head(0, "traceparent"), format!("00-{TRACE}-{ours}-01"));
    assert_eq!(head(0, "tracestate"), "a=1");
    let begun = head(1, "traceparent");
    let (trace, span) = (&begun[3..35], &begun[36..52]);
    assert_eq!(of(trace)["spanId"], span);
    assert!(of(trace)["parentSpanId"].as_str().unwrap_or_default().is_empty() && trace != TRACE, "{begun}");
}

#[tokio::test]
async fn a_failure_is_told_in_its_span() {
    let collector = collector().await;
    let host = Host::configured(&otlp(&collector, ""), &["--worker", MOCK]).await;
    host.http.post(CHAT, "{").await;
    let all = spans(&collector, REQUEST).await;
    let request = all.iter().find(|span| span["name"] == REQUEST).unwrap();
    assert_eq!(attribute(request, "error.type"), "invalid_json");
    assert_eq!(attribute(request, "http.response.status_code").to_string().trim_matches('"'), "400");
}

#[tokio::test]
async fn the_client_decides_what_is_sampled_and_the_ratio_where_it_does_not() {
    let collector = collector().await;
    let host = Host::configured(&otlp(&collector, "sample_ratio = 0.0\n"), &["--worker", MOCK]).await;
    let ask = async |flags: Option<&str>| {
        let value = flags.map(traceparent);
        let headers: Vec<_> = value.iter().map(|value| ("traceparent", value.as_str())).collect();
        host.http.send(Method::POST, CHAT, &headers, chat(1).to_string()).await;
    };
    ask(None).await;
    ask(Some("00")).await;
    ask(Some("01")).await;
    let all = spans(&collector, REQUEST).await;
    assert!(all.iter().all(|span| span["traceId"] == TRACE), "{all:?}");
    assert_eq!(all.iter().filter(|span| span["name"] == REQUEST).count(), 1);
}

#[tokio::test]
async fn without_export_a_context_passes_as_it_came_and_is_in_the_log() {
    let engine = Scripted::answering(whole_answer("200 OK", r#"{"choices":[]}"#)).await;
    let host = Host::start(&["--worker", &engine.worker(), "--log", "json", "--log-level", "debug"]).await;
    let sent = traceparent("01");
    host.http.send(Method::POST, CHAT, &[("traceparent", &sent), ("tracestate", "a=1")], chat(1).to_string()).await;
    for none in ["00-nonsense", ""] {
        host.http.send(Method::POST, CHAT, &[("traceparent", none)], chat(1).to_string()).await;
    }
    let received = engine.received();
    assert!(received[0].head.contains(&format!("traceparent: {sent}")) && received[0].head.contains("tracestate: a=1"));
    assert!(received[1..].iter().all(|received| !received.head.contains("traceparent")), "{received:?}");
    host.process.logs(&format!("\"trace_id\":\"{TRACE}\"")).await;
}

#[tokio::test]
async fn spans_go_as_protobuf_by_default_and_the_last_when_the_host_stops() {
    let collector = collector().await;
    let mut command = dynamo_host(&serve(&[]));
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url()).env("OTEL_SERVICE_NAME", "a-service");
    let mut process = Process::start("dynamo-host serve", &mut command);
    let http = Client::new(&process.listener("front door listening on http://").await);
    eventually("a worker is ready", async || (http.get("/ready").await.status == 200).then_some(())).await;
    http.ask(CHAT, &chat(2)).await;
    let id = process.id().to_string();
    std::process::Command::new("kill").args(["-TERM", &id]).status().unwrap();
    assert!(process.ended().await.success());
    let received = collector.received();
    assert!(!received.is_empty(), "nothing was exported");
    assert!(received[0].head.contains("content-type: application/x-protobuf"), "{}", received[0].head);
    assert!(received[0].body.contains("a-service") && received[0].body.contains(REQUEST));
}

#[tokio::test]
async fn a_collector_that_is_not_there_costs_spans_and_nothing_else() {
    let config = "[otlp]\nendpoint = \"http://127.0.0.1:1\"\n";
    let host = Host::configured(config, &["--worker", MOCK]).await;
    host.serves(3).await;
    eventually("lost spans are counted", async || {
        let lost = host.http.metric("dynamo_host_trace_spans_dropped_total", &[("cause", "export")]).await;
        (lost >= 5.0).then_some(())
    })
    .await;
    host.process.logs("spans of traces are lost").await;
    host.is_well().await;
}
