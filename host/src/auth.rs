//! Who may ask, and on whose behalf: API keys from a file, or a header that a gateway in front of the host sets.
//!
//! Contract: whoever is not let in costs one hash and one look into a table; their body is not read, and no policy hears
//! of them. A key ends here: engines never see it. With keys, a tenant is whom the key says; the header is believed
//! only where it is configured, and only without keys.

mod keys;

use std::sync::Arc;

use dynamo_host_core::RequestFacts;
use http::{HeaderMap, HeaderName, header::AUTHORIZATION};

pub(crate) use self::keys::{Key, Keys, KeysError, NewKey, check};
use crate::{clock::unix_ms, error::RequestError};

/// Where Anthropic's clients send their key.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Longest name of a tenant that a header may give.
const MAX_TENANT_BYTES: usize = 128;

/// How requests are let in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gate {
    pub(crate) keys: Option<Arc<Keys>>,
    pub(crate) tenant_header: Option<HeaderName>,
}

/// Whoever asks, as far as it is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caller {
    tenant: Option<String>,
    key: Option<Arc<Key>>,
}

impl Gate {
    /// Lets a request in by its headers, or says why not.
    pub(crate) fn admit(&self, headers: &HeaderMap) -> Result<Caller, RequestError> {
        let Some(keys) = &self.keys else {
            let named = self.tenant_header.as_ref().and_then(|name| headers.get(name)?.to_str().ok());
            let tenant = named.filter(|name| !name.is_empty() && name.len() <= MAX_TENANT_BYTES).map(str::to_owned);
            return Ok(Caller { tenant, key: None });
        };
        let key = keys.find(given_key(headers).ok_or(RequestError::MissingKey)?).ok_or(RequestError::InvalidKey)?;
        if key.expires_ms.is_some_and(|expires_ms| unix_ms() >= expires_ms) {
            return Err(RequestError::ExpiredKey);
        }
        Ok(Caller { tenant: Some(key.tenant.clone()), key: Some(key) })
    }
}

impl Caller {
    /// Whether it may use a model by this name.
    pub(crate) fn may_use(&self, model: &str) -> bool {
        self.key.as_ref().is_none_or(|key| key.allows(model))
    }

    /// Puts what is known of it into a request's facts, if it may ask for their model.
    pub(crate) fn vouch(self, facts: &mut RequestFacts) -> Result<(), RequestError> {
        if !self.may_use(&facts.model) {
            return Err(RequestError::ModelNotAllowed { model: facts.model.clone() });
        }
        facts.priority = self.key.as_ref().map_or(0, |key| key.priority);
        facts.class = self.key.as_ref().and_then(|key| key.class.clone());
        facts.tenant = self.tenant;
        Ok(())
    }
}

/// The key that a request brings: as a bearer token, or in the header of Anthropic's clients.
fn given_key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.as_bytes().split_at_checked("bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(token.trim_ascii())
    });
    bearer.or_else(|| headers.get(X_API_KEY).map(|value| value.as_bytes().trim_ascii())).filter(|key| !key.is_empty())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn with(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))])
    }

    #[test]
    fn a_key_is_a_bearer_token_or_anthropics_header() {
        assert_eq!(given_key(&with("authorization", "bearer  k ")), Some(&b"k"[..]));
        assert_eq!(given_key(&with("x-api-key", "k")), Some(&b"k"[..]));
        for (name, value) in
            [("authorization", "Basic k"), ("authorization", "Bearer "), ("authorization", "k"), ("x-api-key", "")]
        {
            assert_eq!(given_key(&with(name, value)), None, "{name}: {value}");
        }
    }

    #[test]
    fn a_tenants_header_is_believed_only_where_it_is_configured() {
        let headers = with("x-tenant", "acme");
        assert_eq!(Gate::default().admit(&headers).unwrap().tenant, None);
        let gate = Gate { tenant_header: Some(HeaderName::from_static("x-tenant")), keys: None };
        assert_eq!(gate.admit(&headers).unwrap().tenant.as_deref(), Some("acme"));
        assert_eq!(gate.admit(&HeaderMap::new()).unwrap().tenant, None);
    }
}
