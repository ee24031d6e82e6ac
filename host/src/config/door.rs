//! Who may ask and how: `[auth]`, `[cors]`, `[tls]`, `[admin_tls]` and `[otlp]` of the configuration file.

use std::path::PathBuf;

use http::{HeaderName, HeaderValue};
use serde::Deserialize;

use super::ConfigError;
use crate::{tls::TlsFiles, trace::Otlp};

/// Longest time that browsers may keep a preflight's answer: what they themselves allow at most.
const MAX_CORS_AGE_S: u32 = 86_400;

/// `[auth]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Auth {
    pub(super) keys_file: Option<PathBuf>,
    pub(super) tenant_header: Option<String>,
}

/// `[cors]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cors {
    /// Origins of web pages that may ask, or `*` alone.
    pub(crate) origins: Vec<String>,
    /// How long a browser may keep the answer to its preflight.
    #[serde(default = "default_max_age_s")]
    pub(crate) max_age_s: u32,
}

fn default_max_age_s() -> u32 {
    3600
}

/// The sections as they are written.
pub(super) struct DoorSections {
    pub(super) auth: Auth,
    pub(super) cors: Option<Cors>,
    pub(super) tls: Option<TlsFiles>,
    pub(super) admin_tls: Option<TlsFiles>,
    pub(super) otlp: Option<Otlp>,
}

/// The sections as they are run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DoorConfig {
    pub(crate) keys_file: Option<PathBuf>,
    pub(crate) tenant_header: Option<HeaderName>,
    pub(crate) cors: Option<Cors>,
    pub(crate) tls: Option<TlsFiles>,
    pub(crate) admin_tls: Option<TlsFiles>,
    pub(crate) otlp: Option<Otlp>,
}

impl DoorConfig {
    pub(super) fn resolve(sections: DoorSections, keys: Option<PathBuf>) -> Result<Self, ConfigError> {
        let DoorSections { auth, mut cors, tls, admin_tls, otlp } = sections;
        let keys_file = keys.or(auth.keys_file);
        if keys_file.is_some() && auth.tenant_header.is_some() {
            return Err(ConfigError::TwoTenants);
        }
        let tenant_header = auth.tenant_header.map(|name| name.parse().map_err(|_| ConfigError::TenantHeader { name }));
        let tenant_header = tenant_header.transpose()?;
        cors.as_mut().map(Cors::check).transpose()?;
        let otlp = otlp.or_else(Otlp::from_environment);
        otlp.as_ref().map(Otlp::check).transpose()?;
        Ok(Self { keys_file, tenant_header, cors: cors.filter(|cors| !cors.origins.is_empty()), tls, admin_tls, otlp })
    }
}

impl Cors {
    fn check(&mut self) -> Result<(), ConfigError> {
        let is_any = self.origins == ["*"];
        let is_origin = |origin: &String| {
            let rest = origin.split_once("://").map(|(_, rest)| rest);
            rest.is_some_and(|rest| !rest.is_empty() && !rest.contains(['/', '*'])) && HeaderValue::from_str(origin).is_ok()
        };
        if let Some(origin) = self.origins.iter().find(|origin| !is_any && !is_origin(origin)) {
            return Err(ConfigError::CorsOrigin { origin: origin.clone() });
        }
        self.max_age_s = self.max_age_s.min(MAX_CORS_AGE_S);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(auth: Auth, origins: Option<&[&str]>) -> Result<DoorConfig, String> {
        let origins = origins.map(|origins| origins.iter().map(|&origin| origin.to_owned()).collect());
        let cors = origins.map(|origins| Cors { origins, max_age_s: 1_000_000 });
        let sections = DoorSections { auth, cors, tls: None, admin_tls: None, otlp: None };
        DoorConfig::resolve(sections, None).map_err(|error| error.to_string())
    }

    #[test]
    fn a_tenant_comes_from_keys_or_from_a_header_and_the_header_has_a_name() {
        let both = Auth { keys_file: Some("keys.toml".into()), tenant_header: Some("x-tenant".to_owned()) };
        assert!(resolve(both, None).unwrap_err().contains("keep one of them"));
        let wrong = Auth { tenant_header: Some("x tenant".to_owned()), ..Auth::default() };
        assert!(resolve(wrong, None).unwrap_err().contains("\"x tenant\""));
        let right = Auth { tenant_header: Some("X-Tenant".to_owned()), ..Auth::default() };
        assert_eq!(resolve(right, None).unwrap().tenant_header.unwrap(), "x-tenant");
    }

    #[test]
    fn origins_have_a_scheme_and_no_path() {
        for wrong in ["example.org", "https://example.org/", "https://*.example.org", "*"] {
            assert!(resolve(Auth::default(), Some(&["https://a.example", wrong])).unwrap_err().contains(wrong));
        }
        let cors = resolve(Auth::default(), Some(&["https://a.example:8443", "null://x"])).unwrap().cors.unwrap();
        assert_eq!((cors.origins.len(), cors.max_age_s), (2, MAX_CORS_AGE_S));
        assert!(resolve(Auth::default(), Some(&["*"])).unwrap().cors.is_some());
        assert!(resolve(Auth::default(), Some(&[])).unwrap().cors.is_none());
    }
}
