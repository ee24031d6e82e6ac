//! Encrypted connections: who is trusted, and what is said of a certificate that is not.

use std::{path::PathBuf, sync::Arc};

use dynamo_engine_api::{Engine as _, EngineError};
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use tempfile::TempDir;
use tokio::{net::TcpListener, net::TcpStream, task::JoinSet};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};

use crate::scripted::{
    STREAM_HEAD, Scripted, error_of, http_chunk, read, soon, stream_answer, stream_of, whole_answer, whole_of,
};

const CHAT: &str = include_str!("../fixtures/vllm_chat.sse");

/// An authority, and a folder with its certificate.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, folder }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// A server's side of handshakes, with a certificate for `name` that ends in `until`.
    fn acceptor(&self, name: &str, until: i32) -> TlsAcceptor {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let key = key.serialize_der().try_into().unwrap();
        let mut config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }
}

/// TLS in front of a server.
struct Front {
    url: String,
    _tasks: JoinSet<()>,
}

impl Front {
    async fn of(server: &Scripted, acceptor: TlsAcceptor) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let behind = server.address;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let acceptor = acceptor.clone();
                connections.spawn(async move {
                    let Ok(mut front) = acceptor.accept(stream).await else { return };
                    let mut back = TcpStream::connect(behind).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut front, &mut back).await;
                });
            }
        });
        Self { url, _tasks: tasks }
    }

    fn engine(&self, ca_file: Option<PathBuf>) -> OpenAiEngine {
        OpenAiEngine::new(&self.url, OpenAiOptions { ca_file, ..Default::default() }).unwrap()
    }
}

#[tokio::test]
async fn requests_and_streams_go_through_tls_and_connections_are_kept() {
    let authority = Authority::new();
    let server = Scripted::answering(stream_answer(CHAT)).await;
    let front = Front::of(&server, authority.acceptor("localhost", 2099)).await;
    let engine = front.engine(Some(authority.file()));
    for _ in 0..3 {
        assert_eq!(read(stream_of(&engine).await).await, (CHAT.to_owned(), "done"));
    }
    assert_eq!(server.accepted(), 1);
    let server = Scripted::answering(whole_answer("200 OK", "{}")).await;
    let front = Front::of(&server, authority.acceptor("localhost", 2099)).await;
    let engine = front.engine(Some(authority.file()));
    assert_eq!(whole_of(&engine).await.body, "{}");
    soon(engine.probe()).await.unwrap();
}

#[tokio::test]
async fn dropping_an_encrypted_stream_hangs_up() {
    let (report, mut hung_up) = tokio::sync::mpsc::channel(1);
    let server = Scripted::start(move |mut connection| {
        let report = report.clone();
        async move {
            connection.request().await;
            connection.write(STREAM_HEAD).await;
            connection.write(http_chunk("data: {\"choices\":[{\"index\":0,\"text\":\"a\"}]}\n\n")).await;
            connection.hung_up().await;
            report.send(()).await.unwrap();
        }
    })
    .await;
    let authority = Authority::new();
    let front = Front::of(&server, authority.acceptor("localhost", 2099)).await;
    drop(stream_of(&front.engine(Some(authority.file()))).await);
    soon(hung_up.recv()).await.unwrap();
}

#[tokio::test]
async fn a_certificate_that_is_not_good_is_said_to_be_so_with_what_to_do() {
    let (ours, other) = (Authority::new(), Authority::new());
    let server = Scripted::answering(whole_answer("200 OK", "{}")).await;
    for (acceptor, ca_file, says) in [
        (ours.acceptor("localhost", 2099), None, "an authority that is not trusted; set ca_file"),
        (ours.acceptor("localhost", 2099), Some(other.file()), "an authority that is not trusted; set ca_file"),
        (ours.acceptor("localhost", 2021), Some(ours.file()), "its certificate has expired"),
        (ours.acceptor("engine.example", 2099), Some(ours.file()), "for another name than localhost"),
    ] {
        let front = Front::of(&server, acceptor).await;
        let engine = front.engine(ca_file);
        for error in [error_of(&engine).await, soon(engine.probe()).await.unwrap_err()] {
            assert!(matches!(error, EngineError::Connect { .. }) && error.to_string().contains(says), "{error}");
        }
    }
    assert_eq!(server.accepted(), 0);
}

#[tokio::test]
async fn a_server_that_does_not_encrypt_is_said_to_be_so() {
    let authority = Authority::new();
    let server = Scripted::answering(whole_answer("400 Bad Request", "{}")).await;
    // It waits for lines, and a handshake has none.
    let url = format!("https://localhost:{}", server.address.port());
    let options = OpenAiOptions { ca_file: Some(authority.file()), ..Default::default() };
    let hasty = OpenAiOptions { connect_timeout: std::time::Duration::from_millis(100), ..options.clone() };
    let error = error_of(&OpenAiEngine::new(&url, hasty).unwrap()).await;
    assert_eq!(error.to_string(), format!("cannot connect to {url}: no connection within 100 ms"));
    let server =
        Scripted::start(|mut connection| async move { connection.write("HTTP/1.1 400 Bad Request\r\n\r\n").await }).await;
    let url = format!("https://localhost:{}", server.address.port());
    let error = error_of(&OpenAiEngine::new(&url, options).unwrap()).await.to_string();
    assert!(error.contains("is it an http:// server?"), "{error}");
}

#[test]
fn authorities_for_an_engine_that_does_not_encrypt_are_a_mistake() {
    let options = OpenAiOptions { ca_file: Some("ca.pem".into()), ..Default::default() };
    let error = OpenAiEngine::new("http://engine:8000", options).unwrap_err().to_string();
    assert!(error.contains("ca_file ca.pem is set for http://engine:8000, which is not encrypted"), "{error}");
}
