//! The mock engine over HTTP: real sockets on the loopback, as the host's adapters use it.

mod client;
mod faults;
mod handoff;

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use client::Client;
use dynamo_engine_mock::{MockEngine, model::Snapshot, server, tokens};
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::oneshot, task::JoinSet};

/// A server on a free port; it ends when it is dropped.
struct Server {
    engine: Arc<MockEngine>,
    address: SocketAddr,
    shutdown: oneshot::Sender<()>,
    task: JoinSet<std::io::Result<()>>,
}

impl Server {
    async fn start(parameters: &str) -> Self {
        Self::serve(MockEngine::from_url(&format!("mock://test?model=m&speedup=100&{parameters}")).unwrap()).await
    }

    async fn serve(engine: MockEngine) -> Self {
        let engine = Arc::new(engine);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (shutdown, stopped) = oneshot::channel();
        let mut task = JoinSet::new();
        task.spawn(server::serve(listener, Arc::clone(&engine), async { drop(stopped.await) }));
        Self { engine, address, shutdown, task }
    }

    async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    /// Waits until a condition holds; it is not missed if it held before.
    async fn eventually(&self, what: &str, condition: impl Fn(&Snapshot) -> bool) {
        for _ in 0..6000 {
            if condition(&self.engine.snapshot().await.unwrap()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not within 60 s: {what}; {:?}", self.engine.snapshot().await);
    }
}

async fn within_60_s<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("within 60 s")
}

/// The texts of a completion's stream, joined; checks that it ends as it must.
fn streamed_text(stream: &str) -> String {
    let frames: Vec<_> = stream.split_terminator("\n\n").map(|frame| frame.strip_prefix("data: ").unwrap()).collect();
    let (done, frames) = frames.split_last().unwrap();
    assert_eq!(*done, "[DONE]");
    let choices: Vec<Value> =
        frames.iter().map(|frame| serde_json::from_str::<Value>(frame).unwrap()["choices"][0].take()).collect();
    assert_eq!(choices.last().unwrap()["finish_reason"], "length");
    choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_stream_is_complete_and_carries_the_clients_id() {
    let server = Server::start("").await;
    let body = json!({"model": "m", "prompt": "x", "max_tokens": 40, "stream": true});
    let reply = server.client().await.post("/v1/completions", &[("x-request-id", "mine")], body.to_string()).await;
    assert_eq!(reply.headers["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(reply.headers["x-request-id"], "mine");
    assert!(reply.body.starts_with(r#"data: {"id":"cmpl-mine","object":"text_completion","#), "{}", reply.body);
    assert_eq!(tokens::count(&streamed_text(&reply.body)), Ok(40));
}

#[tokio::test]
async fn a_connection_is_used_again_and_ids_are_made_for_requests_without_one() {
    let server = Server::start("").await;
    let mut client = server.client().await;
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}).to_string();
    let mut ids = Vec::new();
    for _ in 0..2 {
        let reply = client.post("/v1/chat/completions", &[], body.clone()).await;
        assert_eq!((reply.status, &reply.headers["content-type"]), (StatusCode::OK, &"application/json".parse().unwrap()));
        assert_eq!(reply.json()["choices"][0]["message"]["content"], "t0 t1 t2");
        ids.push(reply.json()["id"].as_str().unwrap().to_owned());
    }
    assert!(ids[0] != ids[1] && ids.iter().all(|id| id.starts_with("chatcmpl-")), "{ids:?}");
}

#[tokio::test]
async fn many_streams_are_each_complete_and_in_order() {
    let server = Server::start("max_num_seqs=16").await;
    let mut readers = JoinSet::new();
    for i in 0..64 {
        let mut client = server.client().await;
        readers.spawn(async move {
            let body = json!({"prompt": format!("prompt {i}"), "max_tokens": 10 + i, "stream": true});
            let reply = client.post("/v1/completions", &[], body.to_string()).await;
            assert_eq!(tokens::count(&streamed_text(&reply.body)), Ok(10 + i));
        });
    }
    while let Some(reader) = readers.join_next().await {
        reader.unwrap();
    }
    server.eventually("all is over", |snapshot| snapshot.running == 0 && snapshot.kv_blocks_used == 0).await;
}

#[tokio::test]
async fn a_client_that_hangs_up_cancels_its_stream() {
    let server = Server::start("decode_ms_base=1e12").await;
    let mut client = server.client().await;
    let body = json!({"prompt": "x", "stream": true}).to_string();
    let mut stream = client.send(Method::POST, "/v1/completions", &[], body).await;
    let first = client::next_frame(&mut stream).await;
    assert!(first.contains(r#""text":"t0""#), "{first}");
    server.eventually("it runs", |snapshot| snapshot.running == 1).await;
    drop((stream, client));
    server.eventually("it is gone", |snapshot| (snapshot.running, snapshot.kv_blocks_used) == (0, 0)).await;
    assert_eq!(server.engine.snapshot().await.unwrap().stats.cancelled, 1);
}

#[tokio::test]
async fn a_client_that_hangs_up_cancels_a_request_without_a_stream() {
    let server = Server::start("decode_ms_base=1e12").await;
    let mut client = server.client().await;
    let mut pending = JoinSet::new();
    pending.spawn(async move { client.post("/v1/completions", &[], json!({"prompt": "x"}).to_string()).await });
    server.eventually("it runs", |snapshot| snapshot.running == 1).await;
    pending.shutdown().await;
    server.eventually("it is gone", |snapshot| (snapshot.running, snapshot.kv_blocks_used) == (0, 0)).await;
}

#[tokio::test]
async fn errors_have_vllms_shape() {
    let server = Server::start("").await;
    let mut client = server.client().await;
    for (path, body, status, message) in [
        ("/v1/chat/completions", r#"{"model":"x","messages":[]}"#, 404, "The model `x` does not exist. Valid aliases: m."),
        ("/v1/chat/completions", "{oops", 400, "JSON decode error"),
        ("/v1/completions", r#"{"prompt":"x","max_tokens":100000000}"#, 400, "cannot be greater than max_model_len"),
        ("/tokenize", "{}", 400, "Field required"),
    ] {
        let reply = client.post(path, &[], body.to_owned()).await;
        let error = reply.json()["error"].take();
        assert_eq!((reply.status.as_u16(), error["code"].as_u64()), (status, Some(u64::from(status))));
        assert!(error["message"].as_str().unwrap().contains(message), "{error}");
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused() {
    let server = Server::start("").await;
    let reply = server.client().await.post("/v1/completions", &[], "x".repeat(server::MAX_BODY_BYTES + 1)).await;
    assert_eq!((reply.status, reply.json()["error"]["code"].as_u64()), (StatusCode::PAYLOAD_TOO_LARGE, Some(413)));
}

#[tokio::test]
async fn it_describes_itself_as_vllm_does() {
    let server = Server::start("max_model_len=777").await;
    let mut client = server.client().await;
    let health = client.get("/health").await;
    assert_eq!((health.status, health.body.as_str()), (StatusCode::OK, ""));
    let models = client.get("/v1/models").await.json();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!("m"), &json!(777)));
    assert_eq!(client.get("/load").await.json(), json!({"server_load": 0}));
    assert!(client.get("/version").await.json()["version"].is_string());
    let tokenized = client.post("/tokenize", &[], json!({"prompt": "t0 t1"}).to_string()).await.json();
    assert_eq!(tokenized, json!({"count": 2, "max_model_len": 777, "tokens": [131_072, 131_073], "token_strs": null}));
}

#[tokio::test]
async fn metrics_have_vllms_names_and_labels() {
    let server = Server::start("block_size=32&kv_blocks=2000").await;
    let mut client = server.client().await;
    let body = json!({"prompt": (0..100).collect::<Vec<_>>(), "max_tokens": 5}).to_string();
    for _ in 0..2 {
        client.post("/v1/completions", &[], body.clone()).await;
    }
    let metrics = client.get("/metrics").await;
    assert_eq!(metrics.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    for line in [
        "# TYPE vllm:num_requests_running gauge",
        "vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 0.0",
        "vllm:num_requests_waiting{engine=\"0\",model_name=\"m\"} 0.0",
        "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.0",
        "vllm:prefix_cache_queries_total{engine=\"0\",model_name=\"m\"} 200.0",
        "vllm:prefix_cache_hits_total{engine=\"0\",model_name=\"m\"} 96.0",
        "vllm:prompt_tokens_total{engine=\"0\",model_name=\"m\"} 200.0",
        "vllm:generation_tokens_total{engine=\"0\",model_name=\"m\"} 10.0",
        "vllm:num_preemptions_total{engine=\"0\",model_name=\"m\"} 0.0",
        "vllm:request_success_total{finished_reason=\"length\",engine=\"0\",model_name=\"m\"} 2.0",
        "vllm:time_to_first_token_seconds_bucket{le=\"+Inf\",engine=\"0\",model_name=\"m\"} 2.0",
        "vllm:inter_token_latency_seconds_count{engine=\"0\",model_name=\"m\"} 8.0",
        "vllm:cache_config_info{block_size=\"32\",cache_dtype=\"auto\",enable_prefix_caching=\"True\",engine=\"0\",num_gpu_blocks=\"2000\"} 1.0",
        "vllm:e2e_request_latency_seconds_bucket{le=\"7680.0\",engine=\"0\",model_name=\"m\"} 2.0",
    ] {
        assert!(metrics.body.lines().any(|found| found == line), "{line} is not in:\n{}", metrics.body);
    }
}

#[tokio::test]
async fn the_prefix_cache_is_reset_unless_it_is_in_use() {
    let server = Server::start("decode_ms_base=1e12").await;
    let mut client = server.client().await;
    assert_eq!(client.post("/reset_prefix_cache", &[], String::new()).await.status, StatusCode::OK);
    let mut other = server.client().await;
    let _stream = other.send(Method::POST, "/v1/completions", &[], json!({"prompt": "x", "stream": true}).to_string()).await;
    server.eventually("it runs", |snapshot| snapshot.running == 1).await;
    assert_eq!(client.post("/reset_prefix_cache", &[], String::new()).await.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_server_that_stops_finishes_its_streams() {
    let mut server = Server::start("speedup=5").await;
    let mut client = server.client().await;
    let body = json!({"prompt": "x", "max_tokens": 100, "stream": true}).to_string();
    let mut stream = client.send(Method::POST, "/v1/completions", &[], body).await;
    let first = client::next_frame(&mut stream).await;
    server.shutdown.send(()).unwrap();
    let rest = client::body(stream).await;
    assert_eq!(tokens::count(&streamed_text(&(first + &rest))), Ok(100));
    drop(client);
    within_60_s(server.task.join_next()).await.unwrap().unwrap().unwrap();
}
