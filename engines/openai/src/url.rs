//! An engine's address as an operator writes it.

use dynamo_engine_api::Endpoint;
use http::{
    Uri,
    uri::{Authority, PathAndQuery, Scheme},
};

/// Why a URL is not an engine's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// No URL at all.
    #[error("engine URL `{url}` cannot be read: {reason}; write it as http://HOST:PORT or https://HOST:PORT")]
    Unreadable {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No scheme, or no host.
    #[error("engine URL `{url}` is not complete; write it as http://HOST:PORT or https://HOST:PORT")]
    Incomplete {
        /// What was given.
        url: String,
    },
    /// A scheme that is not spoken.
    #[error("engine URL `{url}` starts with {scheme}://, which is not spoken here; use http:// or https://")]
    Scheme {
        /// What was given.
        url: String,
        /// Its scheme.
        scheme: String,
    },
    /// A path other than `/` or `/v1`.
    #[error("engine URL `{url}` has the path {path}; leave it out: requests go to /v1/… and /health of the host itself")]
    Path {
        /// What was given.
        url: String,
        /// Its path.
        path: String,
    },
    /// A query or a fragment.
    #[error("engine URL `{url}` has a query or a fragment; leave out what follows the port")]
    Query {
        /// What was given.
        url: String,
    },
    /// A user name or password, which the message does not repeat.
    #[error("the engine URL of {host} has a user name or password, which is not supported; leave out what stands before the @")]
    Credentials {
        /// Host and port.
        host: String,
    },
}

/// Where an engine's endpoints are.
#[derive(Clone, Debug)]
pub(crate) struct EngineUrl {
    /// `http://HOST:PORT` or `https://HOST:PORT`, as logs and errors name the engine.
    pub(crate) name: String,
    scheme: Scheme,
    authority: Authority,
    endpoints: [Uri; Endpoint::ALL.len()],
}

impl EngineUrl {
    /// Reads `http://HOST[:PORT]` or `https://HOST[:PORT]`, with or without `/v1`.
    pub(crate) fn parse(url: &str) -> Result<Self, UrlError> {
        let given = || url.to_owned();
        if let Some((_, host)) = url.rsplit_once('@') {
            let host = host.split(['/', '?', '#']).next().unwrap_or_default();
            return Err(UrlError::Credentials { host: host.to_owned() });
        }
        // `http::Uri` drops a fragment without a word.
        if url.contains('#') {
            return Err(UrlError::Query { url: given() });
        }
        let uri: Uri = url
            .parse()
            .map_err(|error: http::uri::InvalidUri| UrlError::Unreadable { url: given(), reason: error.to_string() })?;
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
            return Err(UrlError::Incomplete { url: given() });
        };
        if ![Scheme::HTTP, Scheme::HTTPS].contains(scheme) {
            return Err(UrlError::Scheme { url: given(), scheme: scheme.to_string() });
        }
        if uri.query().is_some() {
            return Err(UrlError::Query { url: given() });
        }
        if !matches!(uri.path().trim_end_matches('/'), "" | "/v1") {
            return Err(UrlError::Path { url: given(), path: uri.path().to_owned() });
        }
        Ok(Self {
            name: format!("{scheme}://{authority}"),
            scheme: scheme.clone(),
            authority: authority.clone(),
            endpoints: Endpoint::ALL.map(|asked| build(scheme, authority, asked.path())),
        })
    }

    /// Where an endpoint is.
    pub(crate) fn of(&self, endpoint: Endpoint) -> &Uri {
        &self.endpoints[endpoint as usize]
    }

    /// Where a path of ours is, with its query if it has one.
    pub(crate) fn at(&self, path: &'static str) -> Uri {
        build(&self.scheme, &self.authority, path)
    }

    /// The host alone: a name or an address, IPv6 in brackets.
    pub(crate) fn host(&self) -> &str {
        self.authority.host()
    }

    /// Whether connections are encrypted.
    pub(crate) fn is_https(&self) -> bool {
        self.scheme == Scheme::HTTPS
    }
}

fn build(scheme: &Scheme, authority: &Authority, path: &'static str) -> Uri {
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(scheme.clone());
    parts.authority = Some(authority.clone());
    parts.path_and_query = Some(PathAndQuery::from_static(path));
    Uri::from_parts(parts).expect("a scheme, an authority and a path are a URI")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_enough_and_v1_is_allowed() {
        for url in ["http://10.0.0.1:8000", "http://10.0.0.1:8000/", "http://10.0.0.1:8000/v1", "http://10.0.0.1:8000/v1/"] {
            let parsed = EngineUrl::parse(url).unwrap();
            assert_eq!(parsed.name, "http://10.0.0.1:8000");
            assert_eq!(parsed.at("/health"), "http://10.0.0.1:8000/health");
            assert_eq!(parsed.of(Endpoint::Completions), "http://10.0.0.1:8000/v1/completions");
        }
        assert_eq!(EngineUrl::parse("http://[::1]:8000").unwrap().at("/v1/models"), "http://[::1]:8000/v1/models");
    }

    #[test]
    fn an_encrypted_engine_is_told_from_a_plain_one() {
        let parsed = EngineUrl::parse("https://engine.example/v1").unwrap();
        assert!(parsed.is_https());
        assert_eq!(parsed.name, "https://engine.example");
        assert_eq!(parsed.of(Endpoint::Messages), "https://engine.example/v1/messages");
        assert_eq!(parsed.at("/v1/loads?format=json"), "https://engine.example/v1/loads?format=json");
        assert!(!EngineUrl::parse("http://engine.example").unwrap().is_https());
    }

    #[track_caller]
    fn refused(url: &str, says: &str) {
        let error = EngineUrl::parse(url).expect_err(url).to_string();
        assert!(error.contains(says), "{url}: {error}");
    }

    #[test]
    fn what_is_refused_says_how_to_write_it() {
        refused("", "http://HOST:PORT");
        refused("localhost:8000", "http://HOST:PORT");
        refused("http://", "http://HOST:PORT");
        refused("http://host:port:8000", "http://HOST:PORT");
        refused("grpc://engine:8000", "grpc://, which is not spoken here; use http:// or https://");
        refused("http://engine:8000/v1/chat/completions", "leave it out");
        refused("http://engine:8000/?key=1", "leave out what follows the port");
        refused("http://engine:8000#top", "leave out what follows the port");
    }

    #[test]
    fn a_password_is_refused_and_not_repeated() {
        refused("http://user:secret@engine:8000/v1", "the engine URL of engine:8000 has a user name");
        let error = EngineUrl::parse("http://user:secret@engine:8000/v1").unwrap_err();
        assert!(!error.to_string().contains("secret"));
    }
}
