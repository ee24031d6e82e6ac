//! One HTTP exchange as a client, over a connection of its own, plain or with TLS: for commands and exports, not for
//! engines. Whoever asks bounds the time.

use std::sync::Arc;

use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, Uri,
    header::{CONNECTION, HOST},
};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

/// Longest answer.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Sends a request to the absolute URI it names and reads the whole answer. `tls` is what `https` trusts.
///
/// # Errors
/// In words for people.
pub(crate) async fn exchange(request: Request<Bytes>, tls: Option<&Arc<ClientConfig>>) -> Result<Response<Bytes>, String> {
    let uri = request.uri().clone();
    let host = uri.host().ok_or("the URL has no host")?.trim_matches(['[', ']']).to_owned();
    let is_tls = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let stream = TcpStream::connect((host.as_str(), port)).await.map_err(|error| error.to_string())?;
    if !is_tls {
        return converse(stream, request, &uri).await;
    }
    let config = tls.ok_or("TLS is not set up for it")?;
    let name = ServerName::try_from(host).map_err(|error| error.to_string())?;
    let stream = TlsConnector::from(Arc::clone(config)).connect(name, stream).await.map_err(|error| error.to_string())?;
    converse(stream, request, &uri).await
}

async fn converse<S>(stream: S, request: Request<Bytes>, uri: &Uri) -> Result<Response<Bytes>, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (mut parts, body) = request.into_parts();
    let authority = uri.authority().map_or("", http::uri::Authority::as_str);
    parts.headers.insert(HOST, HeaderValue::from_str(authority).map_err(|error| error.to_string())?);
    parts.headers.insert(CONNECTION, HeaderValue::from_static("close"));
    parts.uri = uri.path_and_query().map_or("/", |path| path.as_str()).parse().expect("a path is a URI");
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    let answer = async {
        let response = sender.send_request(Request::from_parts(parts, Full::new(body))).await.map_err(|error| said(&error))?;
        let (head, body) = response.into_parts();
        let body =
            Limited::new(body, MAX_ANSWER_BYTES).collect().await.map_err(|error| format!("the answer broke off: {error}"))?;
        Ok(Response::from_parts(head, body.to_bytes()))
    };
    let driven = async {
        // What ends it, the answer says.
        let _ = connection.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        answer = answer => answer,
        () = driven => unreachable!("it never ends"),
    }
}

/// The error and what caused it.
fn said(error: &hyper::Error) -> String {
    let cause = std::error::Error::source(error).map_or_else(String::new, |source| format!(": {source}"));
    format!("{error}{cause}")
}
