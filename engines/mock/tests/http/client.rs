//! A client that has one connection; dropping it hangs up.

use std::net::SocketAddr;

use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, task::JoinSet};

use crate::within_60_s;

pub(crate) struct Client {
    sender: http1::SendRequest<Full<Bytes>>,
    _connection: JoinSet<()>,
}

pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Reply {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(socket)).await.unwrap();
        let mut task = JoinSet::new();
        task.spawn(async { drop(connection.await) });
        Self { sender, _connection: task }
    }

    pub(crate) async fn get(&mut self, path: &str) -> Reply {
        let reply = self.send(Method::GET, path, &[], String::new()).await;
        whole(reply).await
    }

    pub(crate) async fn post(&mut self, path: &str, headers: &[(&str, &str)], body: String) -> Reply {
        let reply = self.send(Method::POST, path, headers, body).await;
        whole(reply).await
    }

    /// Sends a request and returns when the head of its reply is there.
    pub(crate) async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Response<Incoming> {
        let mut request =
            Request::builder().method(method).uri(path).header("host", "mock").header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::from(body)).unwrap();
        within_60_s(async {
            self.sender.ready().await.unwrap();
            self.sender.send_request(request).await.unwrap()
        })
        .await
    }
}

async fn whole(reply: Response<Incoming>) -> Reply {
    Reply { status: reply.status(), headers: reply.headers().clone(), body: body(reply).await }
}

/// The rest of a reply's body.
pub(crate) async fn body(reply: Response<Incoming>) -> String {
    let bytes = within_60_s(reply.into_body().collect()).await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The next piece of a reply's body.
pub(crate) async fn next_frame(reply: &mut Response<Incoming>) -> String {
    let frame = within_60_s(reply.body_mut().frame()).await.unwrap().unwrap();
    String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap()
}
