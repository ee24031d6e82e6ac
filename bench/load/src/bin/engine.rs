//! A fake engine: vLLM's endpoints, and answers that cost next to nothing to make.
//!
//! Every token is an HTTP chunk and a write of its own, as with vLLM. Unpaced, the next one is written as soon as other
//! connections had their turn; with `--pace-ms` it waits, and token *n* leaves *n* paces after the first.
//!
//! It has a part in hand-offs as vLLM with its NixlConnector has, without any KV: a prefill's answer says where it would be, and
//! who decodes takes no notice.
//!
//! Prints its URL, then serves until it is killed.
#![allow(clippy::print_stdout)]

use std::{
    cell::Cell,
    io,
    net::SocketAddr,
    process::ExitCode,
    rc::Rc,
    time::{Duration, SystemTime},
};

use clap::Parser;
use load::{
    http::{Connection, Request},
    replies::{self, Asked, Kind, Reply, chunk},
};
use tokio::{io::AsyncWriteExt, net::TcpListener, task, task::JoinSet, time};

/// A fake OpenAI-compatible engine for measuring proxies.
#[derive(Parser)]
struct Arguments {
    /// Port on 127.0.0.1; 0 for any free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Model that it serves
    #[arg(long, default_value = "bench")]
    model: String,
    /// Milliseconds between the tokens of a stream; 0 for none
    #[arg(long, default_value_t = 0)]
    pace_ms: u64,
}

struct Engine {
    model: String,
    pace: Duration,
    serial: Cell<u64>,
    running: Cell<u64>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match serve(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("engine: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(arguments: Arguments) -> io::Result<()> {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], arguments.port))).await?;
    println!("engine listening on http://{}", listener.local_addr()?);
    let engine = Rc::new(Engine {
        model: arguments.model,
        pace: Duration::from_millis(arguments.pace_ms),
        serial: Cell::new(1),
        running: Cell::new(0),
    });
    let local = task::LocalSet::new();
    let accept = async move {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let engine = Rc::clone(&engine);
                    let connection = Connection::new(accepted?.0)?;
                    // A client that goes away is no fault of the engine's.
                    connections.spawn_local(async move { drop(converse(&engine, connection).await) });
                }
                Some(_) = connections.join_next() => {}
            }
        }
    };
    local.run_until(accept).await
}

async fn converse(engine: &Engine, mut connection: Connection) -> io::Result<()> {
    let mut body = Vec::new();
    while let Some(mut request) = connection.request().await? {
        body.clear();
        while connection.read_body(&mut request.body, &mut body).await? {}
        engine.running.set(engine.running.get() + 1);
        let answered = answer(engine, &mut connection, &request, &body).await;
        engine.running.set(engine.running.get() - 1);
        answered?;
        if request.close {
            break;
        }
    }
    Ok(())
}

async fn answer(engine: &Engine, connection: &mut Connection, request: &Request, body: &[u8]) -> io::Result<()> {
    let path = request.path.split('?').next().unwrap_or_default();
    let kind = match (request.method.as_str(), path) {
        ("POST", "/v1/chat/completions") => Kind::Chat,
        ("POST", "/v1/completions") => Kind::Completion,
        _ => {
            let (status, kind, text) = about(engine, &request.method, path, body);
            return whole(connection, status, kind, &text).await;
        }
    };
    let asked: Asked = match serde_json::from_slice(body) {
        Ok(asked) => asked,
        Err(error) => {
            let error = serde_json::json!({"error": {"message": error.to_string(), "type": "BadRequestError", "code": 400}});
            return whole(connection, "400 Bad Request", "application/json", &error.to_string()).await;
        }
    };
    let serial = engine.serial.replace(engine.serial.get() + 1);
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let reply = Reply { kind, model: &engine.model, serial, created, tokens: asked.tokens() };
    if asked.is_prefill() {
        let mut text = reply.whole();
        text.pop();
        text.push_str(&asked.prefilled(serial, body));
        whole(connection, "200 OK", "application/json", &text).await
    } else if asked.stream {
        stream(connection, &reply, engine.pace, asked.usage()).await
    } else {
        // No sleep is shorter than a millisecond.
        if !engine.pace.is_zero() {
            time::sleep(engine.pace * reply.tokens.saturating_sub(1)).await;
        }
        whole(connection, "200 OK", "application/json", &reply.whole()).await
    }
}

async fn stream(connection: &mut Connection, reply: &Reply<'_>, pace: Duration, usage: bool) -> io::Result<()> {
    const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n\
        transfer-encoding: chunked\r\n\r\n";
    let mut output = Vec::with_capacity(1024);
    output.extend_from_slice(HEAD);
    if let Some(role) = reply.role() {
        chunk(&mut output, &[role.as_bytes()]);
    }
    connection.stream.write_all(&output).await?;
    let begun = time::Instant::now();
    let before = reply.before_token();
    for token in 0..reply.tokens {
        if pace.is_zero() {
            task::yield_now().await;
        } else if token > 0 {
            time::sleep_until(begun + pace * token).await;
        }
        output.clear();
        let after = reply.after_token(token + 1 == reply.tokens);
        chunk(&mut output, &[before.as_bytes(), token.to_string().as_bytes(), after.as_bytes()]);
        connection.stream.write_all(&output).await?;
    }
    output.clear();
    if usage {
        chunk(&mut output, &[reply.usage_event().as_bytes()]);
    }
    chunk(&mut output, &[b"data: [DONE]\n\n"]);
    output.extend_from_slice(b"0\r\n\r\n");
    connection.stream.write_all(&output).await
}

/// What an engine tells of itself and of prompts: status, content type, body. Routers ask some of it before they trust a
/// worker, and some of it for each request.
fn about(engine: &Engine, method: &str, path: &str, body: &[u8]) -> (&'static str, &'static str, String) {
    const JSON: &str = "application/json";
    let Engine { model, .. } = engine;
    match (method, path) {
        ("GET", "/health" | "/ping") => ("200 OK", JSON, String::new()),
        ("GET", "/version") => ("200 OK", JSON, r#"{"version":"0.32.0"}"#.to_owned()),
        ("GET", "/v1/models") => {
            let list = format!(
                r#"{{"object":"list","data":[{{"id":"{model}","object":"model","created":1795327942,"owned_by":"vllm","root":"{model}","parent":null,"max_model_len":32768,"permission":[]}}]}}"#
            );
            ("200 OK", JSON, list)
        }
        ("GET", "/metrics") => {
            let running = engine.running.get();
            let text = format!(
                "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{engine=\"0\",model_name=\"{model}\"}} {running}.0\n\
                 # TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{{engine=\"0\",model_name=\"{model}\"}} 0.0\n\
                 # TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{{engine=\"0\",model_name=\"{model}\"}} 0.0\n"
            );
            ("200 OK", "text/plain; version=0.0.4; charset=utf-8", text)
        }
        // vLLM's router asks for each prompt's tokens when it looks for prefixes.
        ("POST", "/v1/chat/completions/render") => ("200 OK", JSON, replies::render(model, body)),
        ("POST", "/tokenize") => ("200 OK", JSON, replies::tokenize(body)),
        ("GET", "/load") => ("200 OK", JSON, format!(r#"{{"server_load":{}}}"#, engine.running.get())),
        ("GET", "/server_info" | "/get_server_info") => {
            ("200 OK", JSON, format!(r#"{{"model_path":"{model}","served_model_name":"{model}","tp_size":1,"dp_size":1}}"#))
        }
        ("GET", "/model_info" | "/get_model_info") => {
            ("200 OK", JSON, format!(r#"{{"model_path":"{model}","tokenizer_path":"{model}","is_generation":true}}"#))
        }
        _ => ("404 Not Found", JSON, r#"{"detail":"Not Found"}"#.to_owned()),
    }
}

async fn whole(connection: &mut Connection, status: &str, kind: &str, body: &str) -> io::Result<()> {
    let head = format!("HTTP/1.1 {status}\r\nserver: uvicorn\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", body.len());
    connection.stream.write_all(format!("{head}{body}").as_bytes()).await
}
