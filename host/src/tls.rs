//! TLS: certificates of the listeners, read again when they change, and what the host trusts as a client.
//!
//! Contract: TLS 1.2 and 1.3, HTTP/1.1 by ALPN, ring as the provider. Certificates that cannot be read again leave those
//! that were read before; connections that are open keep theirs.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use serde::Deserialize;

use crate::watch;

/// PEM files of one listener.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TlsFiles {
    /// The certificate, then those between it and the root.
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
    /// Clients must show a certificate of one of these.
    #[serde(default)]
    pub(crate) client_ca: Option<PathBuf>,
}

/// TLS that cannot be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("{key} {path:?}: {reason}; write the path of a PEM file")]
    File { key: &'static str, path: PathBuf, reason: String },
    #[error("{cert:?} and {key:?} cannot be used together: {reason}")]
    Pair { cert: PathBuf, key: PathBuf, reason: String },
    #[error("no certificate of this system can be read: {reason}; name one to trust with --admin-ca")]
    NoRoots { reason: String },
}

/// A listener's certificates, as their files last said.
#[derive(Debug)]
pub(crate) struct ServerTls {
    files: TlsFiles,
    current: ArcSwap<ServerConfig>,
}

impl ServerTls {
    /// Reads the files.
    ///
    /// # Errors
    /// Names the file that is wrong.
    pub(crate) fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let current = ArcSwap::new(server_config(&files)?);
        Ok(Self { files, current })
    }

    /// Reads the files again; connections from now on get what they say.
    ///
    /// # Errors
    /// As [`load`](Self::load); then all is as before.
    pub(crate) fn reload(&self) -> Result<(), TlsError> {
        self.current.store(server_config(&self.files)?);
        Ok(())
    }

    /// Reloads whenever a file changes.
    pub(crate) fn watch(self: &Arc<Self>) {
        let tls = Arc::clone(self);
        let TlsFiles { cert, key, client_ca } = self.files.clone();
        watch::files("TLS certificates", [Some(cert), Some(key), client_ca].into_iter().flatten().collect(), move || {
            tls.reload()
        });
    }

    pub(crate) fn current(&self) -> Arc<ServerConfig> {
        self.current.load_full()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn server_config(files: &TlsFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let TlsFiles { cert, key, client_ca } = files;
    let pair = |reason: String| TlsError::Pair { cert: cert.clone(), key: key.clone(), reason };
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| pair(error.to_string()))?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots("client_ca", path)?), provider()).build();
            let wrong = |reason: String| TlsError::File { key: "client_ca", path: path.clone(), reason };
            builder.with_client_cert_verifier(verifier.map_err(|error| wrong(error.to_string()))?)
        }
    };
    let built = builder.with_single_cert(certificates("cert", cert)?, private_key("key", key)?);
    let mut config = built.map_err(|error| pair(error.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// What the host trusts as a client: the authorities of a file, or those of the system. `identity`: the files of its
/// own certificate and key.
///
/// # Errors
/// Names the file that is wrong.
pub(crate) fn client_config(ca: Option<&Path>, identity: Option<(&Path, &Path)>) -> Result<Arc<ClientConfig>, TlsError> {
    let trusted = match ca {
        Some(path) => roots("--admin-ca", path)?,
        None => system_roots()?,
    };
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| TlsError::NoRoots { reason: error.to_string() })?.with_root_certificates(trusted);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => builder
            .with_client_auth_cert(certificates("--admin-cert", cert)?, private_key("--admin-key", key)?)
            .map_err(|error| TlsError::Pair { cert: cert.to_owned(), key: key.to_owned(), reason: error.to_string() })?,
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let reason = found.errors.first().map_or_else(|| "there is none".to_owned(), ToString::to_string);
        return Err(TlsError::NoRoots { reason });
    }
    Ok(roots)
}

fn roots(key: &'static str, path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(key, path)? {
        let wrong = |reason: String| TlsError::File { key, path: path.to_owned(), reason };
        roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
    }
    Ok(roots)
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |reason: String| TlsError::File { key, path: path.to_owned(), reason };
    let read: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match read {
        Ok(certificates) if certificates.is_empty() => Err(wrong("there is no certificate in it".to_owned())),
        other => other.map_err(|error| wrong(error.to_string())),
    }
}

fn private_key(key: &'static str, path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| TlsError::File { key, path: path.to_owned(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn pair(directory: &Path, name: &str) -> TlsFiles {
        let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
        let files = TlsFiles { cert: directory.join("cert.pem"), key: directory.join("key.pem"), client_ca: None };
        fs::write(&files.cert, made.cert.pem()).unwrap();
        fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        files
    }

    #[test]
    fn certificates_are_read_again_and_kept_if_they_cannot_be() {
        let directory = tempfile::tempdir().unwrap();
        let tls = ServerTls::load(pair(directory.path(), "one")).unwrap();
        let first = tls.current();
        assert_eq!(first.alpn_protocols, [b"http/1.1"]);
        fs::write(directory.path().join("cert.pem"), "half").unwrap();
        tls.reload().unwrap_err();
        assert!(Arc::ptr_eq(&first, &tls.current()));
        pair(directory.path(), "two");
        tls.reload().unwrap();
        assert!(!Arc::ptr_eq(&first, &tls.current()));
    }

    #[test]
    fn a_wrong_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let files = pair(directory.path(), "one");
        let says = |files: TlsFiles| ServerTls::load(files).unwrap_err().to_string();
        let none = says(TlsFiles { cert: "/nowhere.pem".into(), ..files.clone() });
        assert!(none.contains("cert \"/nowhere.pem\""), "{none}");
        let swapped = says(TlsFiles { cert: files.key.clone(), ..files.clone() });
        assert!(swapped.contains("no certificate in it"), "{swapped}");
        let no_key = says(TlsFiles { key: files.cert.clone(), ..files.clone() });
        assert!(no_key.contains("key \""), "{no_key}");
        let other = tempfile::tempdir().unwrap();
        let foreign = pair(other.path(), "two");
        let apart = says(TlsFiles { key: foreign.key, ..files });
        assert!(apart.contains("cannot be used together"), "{apart}");
    }
}
