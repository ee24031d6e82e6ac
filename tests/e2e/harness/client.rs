//! A small HTTP client: whole replies, streams, and bytes that no proper client would send.

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap},
};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{
    soon,
    sse::{Events, Streamed},
};

/// A client of one server.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    base: String,
    token: Option<String>,
    http: legacy::Client<HttpConnector, Full<Bytes>>,
}

/// A whole reply.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Client {
    pub(crate) fn new(base: &str) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        // Retries would hide a server that closes connections under its clients.
        let http = legacy::Client::builder(TokioExecutor::new()).retry_canceled_requests(false).build(connector);
        Self { base: base.trim_end_matches('/').to_owned(), token: None, http }
    }

    /// The same with a token.
    pub(crate) fn with_token(&self, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..self.clone() }
    }

    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// Sends a request and returns when the head of its reply is there.
    ///
    /// # Errors
    /// If there is no reply.
    pub(crate) async fn try_send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Response<Incoming>, String> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        request = request.header(CONTENT_TYPE, "application/json");
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).unwrap();
        let sent = soon("a reply begins", self.http.request(request)).await;
        sent.map_err(|error| format!("{}{path}: {error:?}", self.base))
    }

    /// Sends a request and reads its reply.
    pub(crate) async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Reply {
        Reply::read(self.try_send(method, path, headers, body).await.unwrap()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(Method::GET, path, &[], Bytes::new()).await
    }

    pub(crate) async fn get_json(&self, path: &str) -> Value {
        let reply = self.get(path).await;
        assert_eq!(reply.status, StatusCode::OK, "{path}: {}", reply.text());
        reply.json()
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<Bytes>) -> Reply {
        self.send(Method::POST, path, &[], body).await
    }

    /// Asks, and gets an answer that is no error.
    pub(crate) async fn ask(&self, path: &str, body: &Value) -> Reply {
        let reply = self.post(path, body.to_string()).await;
        assert_eq!(reply.status, StatusCode::OK, "{body}: {}", reply.text());
        reply
    }

    /// Opens a stream: its head is there.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) async fn try_open(&self, path: &str, body: &Value) -> Result<Events, String> {
        let reply = self.try_send(Method::POST, path, &[], body.to_string()).await?;
        let kind = reply.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if reply.status() == StatusCode::OK && kind.starts_with("text/event-stream") {
            return Ok(Events::new(reply));
        }
        let reply = Reply::read(reply).await;
        Err(format!("no stream but {} {:?}: {}", reply.status, reply.headers, reply.text()))
    }

    pub(crate) async fn open(&self, path: &str, body: &Value) -> Events {
        self.try_open(path, body).await.unwrap()
    }

    /// Asks for a stream and reads all of it.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Streamed {
        self.open(path, body).await.streamed().await.unwrap()
    }

    /// A metric's value: the sum over all samples that have these labels.
    pub(crate) async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let page = self.get("/metrics").await.text();
        let samples = page.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (found, found_labels) = series.split_once('{').unwrap_or((series, ""));
            let matches = found == name && labels.iter().all(|(key, value)| found_labels.contains(&format!("{key}=\"{value}\"")));
            matches.then(|| value.parse::<f64>().unwrap_or_else(|_| panic!("not a sample: {line}")))
        });
        samples.sum()
    }

    /// Sends bytes as they are, and returns what comes back until the server closes, or until that has `enough`.
    pub(crate) async fn raw(&self, bytes: &[u8], enough: &str) -> String {
        let mut socket = self.socket().await;
        // The server may close before it has read everything.
        let _ = soon("bytes are sent", socket.write_all(bytes)).await;
        read_raw(&mut socket, enough).await
    }

    /// A connection of its own.
    pub(crate) async fn socket(&self) -> TcpStream {
        let address = self.base.strip_prefix("http://").unwrap();
        soon("a connection", TcpStream::connect(address)).await.unwrap()
    }
}

/// Reads what comes until the server closes, or until it has `enough`.
pub(crate) async fn read_raw(socket: &mut TcpStream, enough: &str) -> String {
    let mut answer = Vec::new();
    while !String::from_utf8_lossy(&answer).contains(enough) {
        match soon("an answer", socket.read_buf(&mut answer)).await {
            Ok(length) if length > 0 => {}
            _ => break,
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

impl Reply {
    async fn read(reply: Response<Incoming>) -> Self {
        let (head, body) = reply.into_parts();
        let body = soon("a reply's end", body.collect()).await.unwrap().to_bytes();
        Self { status: head.status, headers: head.headers, body }
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// A header's text; empty without it.
    pub(crate) fn header(&self, name: &str) -> &str {
        header(&self.headers, name)
    }

    /// Checks that this is an error in OpenAI's shape, and returns its message.
    #[track_caller]
    pub(crate) fn is_error(&self, status: u16, code: &str) -> String {
        assert_eq!(self.status.as_u16(), status, "status, with: {}", self.text());
        assert!(self.header("content-type").starts_with("application/json"), "{:?}", self.headers);
        let error = &self.json()["error"];
        assert_eq!(error["code"], code, "code, with: {}", self.text());
        let message = error["message"].as_str().unwrap_or_default();
        assert!(!message.is_empty(), "an error without a message: {}", self.text());
        message.to_owned()
    }
}

/// A header's text; empty without it.
pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}
