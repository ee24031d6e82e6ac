//! Encrypted connections to engines: whom to trust, the handshake, and a stream that is plain or encrypted.
//!
//! Contract: certificates are always verified, against the system's authorities or against the given file's alone; there
//! is no way to switch that off. HTTP/1.1 is offered by ALPN. A failed handshake is an `io::Error` whose root cause is a
//! [`HandshakeError`]: what is wrong with the certificate and which setting mends it.

use std::{
    fs, io,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
};

use rustls::{
    CertificateError, ClientConfig, Error, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Why encrypted connections cannot be set up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// The file of authorities is not to be had.
    #[error("ca_file {} cannot be read: {reason}; name a PEM file", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The file has something that is not a certificate.
    #[error("ca_file {} is not PEM: {reason}; it should hold the certificates of authorities", path.display())]
    NotPem {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file has no certificate.
    #[error("ca_file {} has no certificate; it should hold those of authorities, between BEGIN CERTIFICATE lines", path.display())]
    NoCertificate {
        /// Which file.
        path: PathBuf,
    },
    /// A file of authorities for connections that are not encrypted.
    #[error("ca_file {} is set for {url}, which is not encrypted; write the URL with https://, or leave ca_file out", path.display())]
    NotEncrypted {
        /// Which file.
        path: PathBuf,
        /// The engine's URL.
        url: String,
    },
    /// The system trusts nobody.
    #[error("the system has no certificate authorities ({reason}); install them (ca-certificates), or set ca_file")]
    NoSystemRoots {
        /// What the system said.
        reason: String,
    },
}

/// What is wrong with the server's side of a handshake, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("its certificate is from an authority that is not trusted; set ca_file to that authority's certificate")]
    UnknownIssuer,
    #[error("its certificate has expired; renew it on the server")]
    Expired,
    #[error("its certificate is not valid yet; check the clocks of both machines")]
    NotYetValid,
    #[error("its certificate is for another name than {name}; use the name in the URL that the certificate has")]
    WrongName { name: String },
    #[error("its certificate is not acceptable: {0}")]
    Certificate(String),
    #[error("it does not answer with TLS ({0}); is it an http:// server?")]
    NotTls(String),
    #[error("the TLS handshake failed: {0}")]
    Other(String),
}

/// The settings for encrypted connections: trusting the authorities in `ca_file`, else the system's.
///
/// # Errors
/// If there are no authorities to trust.
pub(crate) fn config(ca_file: Option<PathBuf>) -> Result<Arc<ClientConfig>, TlsError> {
    /// One for all engines: the system's authorities are some hundred certificates.
    static SYSTEM: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    if let Some(path) = ca_file {
        return Ok(trusting(authorities(path)?));
    }
    if let Some(config) = SYSTEM.get() {
        return Ok(config.clone());
    }
    let config = trusting(system_authorities()?);
    Ok(SYSTEM.get_or_init(|| config).clone())
}

fn trusting(roots: RootCertStore) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let versions = versions.expect("ring speaks the default versions");
    let mut config = versions.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

fn authorities(path: PathBuf) -> Result<RootCertStore, TlsError> {
    let pem = fs::read(&path).map_err(|error| TlsError::Unreadable { path: path.clone(), reason: error.to_string() })?;
    let not_pem = |reason: String| TlsError::NotPem { path: path.clone(), reason };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| not_pem(error.to_string()))?;
        roots.add(certificate).map_err(|error| not_pem(error.to_string()))?;
    }
    if roots.is_empty() { Err(TlsError::NoCertificate { path }) } else { Ok(roots) }
}

/// Those that can be used: a system often has a few that cannot.
fn system_authorities() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let reason = found.errors.first().map_or_else(|| "none found".to_owned(), ToString::to_string);
        return Err(TlsError::NoSystemRoots { reason });
    }
    Ok(roots)
}

/// The name that a server's certificate must have, from the host in a URL.
pub(crate) fn server_name(host: &str) -> io::Result<ServerName<'static>> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    ServerName::try_from(bare.to_owned()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// Shakes hands over a new connection.
///
/// # Errors
/// With a [`HandshakeError`] as root cause, or the system's own error.
pub(crate) async fn connect(config: Arc<ClientConfig>, name: ServerName<'static>, tcp: TcpStream) -> io::Result<Stream> {
    let called = name.to_str().into_owned();
    let stream = TlsConnector::from(config).connect(name, tcp).await.map_err(|error| explained(error, &called))?;
    Ok(Stream::Tls(Box::new(stream)))
}

fn explained(error: io::Error, name: &str) -> io::Error {
    let Some(cause) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else { return error };
    let explained = match cause {
        // A bad signature is another authority of the same name: one that was made anew.
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            HandshakeError::UnknownIssuer
        }
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => HandshakeError::Expired,
        Error::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => {
            HandshakeError::NotYetValid
        }
        Error::InvalidCertificate(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }) => {
            HandshakeError::WrongName { name: name.to_owned() }
        }
        Error::InvalidCertificate(other) => HandshakeError::Certificate(other.to_string()),
        Error::InvalidMessage(what) => HandshakeError::NotTls(format!("{what:?}")),
        other => HandshakeError::Other(other.to_string()),
    };
    io::Error::new(error.kind(), explained)
}

/// A connection to an engine, encrypted or not.
#[derive(Debug)]
pub(crate) enum Stream {
    /// As it is.
    Plain(TcpStream),
    /// Within TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(text: &str, says: &str) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        fs::write(&path, text).unwrap();
        let error = config(Some(path.clone())).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains(path.to_str().unwrap()), "{error}");
    }

    #[test]
    fn a_file_without_authorities_is_refused_by_name() {
        refused("", "has no certificate");
        refused("hello", "has no certificate");
        refused("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n", "is not PEM");
        refused("-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n", "is not PEM");
        let error = config(Some("/no/such/ca.pem".into())).unwrap_err().to_string();
        assert!(error.starts_with("ca_file /no/such/ca.pem cannot be read: No such file"), "{error}");
    }

    #[test]
    fn hosts_of_urls_are_names_of_servers() {
        for (host, name) in [("engine.example", "engine.example"), ("10.0.0.1", "10.0.0.1"), ("[::1]", "::1")] {
            assert_eq!(server_name(host).unwrap().to_str(), name);
        }
        assert!(server_name("two words").is_err());
    }
}
