//! TLS on both listeners: certificates, client certificates, their change in a running host, and clients that do not
//! speak it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use crate::harness::{
    eventually,
    host::chat,
    process::{Process, dynamo_host, run},
    soon,
};

/// An authority of its own, and files that it signed.
struct Authority {
    directory: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(directory.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { directory, issuer: Issuer::new(params, key) }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes `NAME.pem` and `NAME.key` for 127.0.0.1.
    fn issue(&self, name: &str) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        fs::write(self.file(&format!("{name}.pem")), certificate.pem()).unwrap();
        fs::write(self.file(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    /// A host with this configuration, in whose text `DIR` stands for the files' directory: itself, front door, admin.
    async fn host(&self, text: &str) -> (Process, String, String) {
        let config = self.file("host.toml");
        fs::write(&config, text.replace("DIR", self.directory.path().to_str().unwrap())).unwrap();
        let arguments = [
            "serve",
            "--http",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
            "--worker",
            "mock://a?model=m&speedup=50",
            "--config",
            config.to_str().unwrap(),
        ];
        let mut host = Process::start("dynamo-host serve", &mut dynamo_host(&arguments));
        let http = host.listener("front door listening on https://").await;
        let admin = host.listener("admin listening on ").await;
        (host, http, admin)
    }

    /// The certificate that a listener shows, if the handshake is done; and its answer to a request.
    async fn ask(&self, url: &str, request: &str) -> Result<(CertificateDer<'static>, String), String> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.file("ca.pem")).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let stream = TcpStream::connect(url.strip_prefix("https://").unwrap()).await.unwrap();
        let connecting = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("127.0.0.1").unwrap(), stream);
        let mut stream = soon("a handshake", connecting).await.map_err(|error| error.to_string())?;
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        let shown = stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned();
        stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
        let mut answer = Vec::new();
        soon("an answer", stream.read_to_end(&mut answer)).await.map_err(|error| error.to_string())?;
        Ok((shown, String::from_utf8(answer).unwrap()))
    }

    async fn shown(&self, url: &str) -> CertificateDer<'static> {
        self.ask(url, LIVE).await.unwrap().0
    }
}

const LIVE: &str = "GET /live HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
const DOOR: &str = "[tls]\ncert = \"DIR/door.pem\"\nkey = \"DIR/door.key\"\n";

async fn plain(url: &str, sent: &str) -> String {
    let address = url.strip_prefix("https://").unwrap();
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(sent.as_bytes()).await.unwrap();
    let mut answer = String::new();
    soon("it is closed", socket.read_to_string(&mut answer)).await.unwrap();
    answer
}

#[tokio::test]
async fn the_front_door_speaks_tls_and_says_so_to_those_who_do_not() {
    let authority = Authority::new();
    authority.issue("door");
    let (host, http, admin) = authority.host(DOOR).await;
    assert!(admin.starts_with("http://"), "{admin}");
    let body = chat(5).to_string();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let (_, answer) = authority.ask(&http, &request).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("t0 t1 t2 t3 t4"), "{answer}");
    let answer = plain(&http, LIVE).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    assert_eq!(serde_json::from_str::<Value>(body).unwrap()["error"]["code"], "tls_required");
    assert!(authority.ask(&http, LIVE).await.unwrap().1.starts_with("HTTP/1.1 200"));
    assert!(!host.panicked());
}

#[tokio::test]
async fn a_handshake_that_is_not_done_is_hung_up_on() {
    let authority = Authority::new();
    authority.issue("door");
    let (_host, http, _) = authority.host(&format!("{DOOR}[limits]\nheader_timeout_s = 1\n")).await;
    for begins in ["", "\u{16}", "\u{16}\u{3}\u{1}"] {
        assert_eq!(plain(&http, begins).await, "");
    }
    assert!(authority.ask(&http, LIVE).await.unwrap().1.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn the_admin_api_lets_in_whose_certificate_it_knows() {
    let authority = Authority::new();
    ["door", "operator"].iter().for_each(|name| authority.issue(name));
    let admin_tls = DOOR.replace("[tls]", "[admin_tls]") + "client_ca = \"DIR/ca.pem\"\n";
    let (_host, _, admin) = authority.host(&format!("{DOOR}{admin_tls}")).await;
    let file = |name: &str| authority.file(name).to_str().unwrap().to_owned();
    let (ca, cert, key) = (file("ca.pem"), file("operator.pem"), file("operator.key"));
    let list = ["policy", "list", "--admin", &admin];
    run(&[&list[..], &["--admin-ca", &ca, "--admin-cert", &cert, "--admin-key", &key]].concat()).await.succeeded();
    run(&[&list[..], &["--admin-ca", &ca]].concat()).await.failed(1, &["cannot reach the admin API"]);
    run(&list).await.failed(1, &["certificate"]);
    run(&[&list[..], &["--admin-ca", "/nowhere.pem"]].concat()).await.failed(1, &["--admin-ca \"/nowhere.pem\""]);
    // A client's certificate is asked for after the handshake, as TLS 1.3 has it.
    let stranger = authority.ask(&admin, LIVE).await;
    assert!(!stranger.is_ok_and(|(_, answer)| answer.contains("HTTP/1.1")), "it answered a stranger");
}

#[tokio::test]
async fn new_certificates_are_taken_up_and_broken_ones_leave_the_old() {
    let authority = Authority::new();
    authority.issue("door");
    let (host, http, _) = authority.host(DOOR).await;
    let first = authority.shown(&http).await;
    fs::write(authority.file("door.pem"), "half a certificate").unwrap();
    host.logs("what was read before stays in force").await;
    assert_eq!(authority.shown(&http).await, first);
    authority.issue("door");
    eventually("the new certificate is shown", async || (authority.shown(&http).await != first).then_some(())).await;
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_refused_at_the_start() {
    let authority = Authority::new();
    authority.issue("door");
    let config = authority.file("host.toml");
    let directory = authority.directory.path().to_str().unwrap();
    for (text, says) in [
        (DOOR.replace("door.pem", "none.pem"), ["[tls]", "none.pem"]),
        (DOOR.replace("door.key", "door.pem"), ["[tls]", "door.pem"]),
        (DOOR.replace("[tls]", "[admin_tls]").replace("door.pem", "none.pem"), ["[admin_tls]", "none.pem"]),
        (DOOR.replace("cert =", "certificate ="), ["certificate", "cert"]),
    ] {
        fs::write(&config, text.replace("DIR", directory)).unwrap();
        let path: &Path = &config;
        let finished = run(&["serve", "--worker", "mock://a?model=m", "--config", path.to_str().unwrap()]).await;
        finished.failed(2, &says);
    }
}
