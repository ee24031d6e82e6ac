//! When a request goes on with another worker: `[migration]` of the configuration file.

use serde::Deserialize;

use super::ConfigError;

/// When a request goes on with another worker.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Migration {
    /// Whether streams that have begun go on elsewhere.
    pub(crate) enabled: bool,
    /// Workers that one request is given to, the first included; of several choices that go on, each counts alone.
    pub(crate) max_attempts: u32,
    /// Bytes that are kept of one stream, so that it can go on: text, token ids, and what was not looked at yet.
    pub(crate) max_kept_bytes: usize,
}

impl Default for Migration {
    fn default() -> Self {
        Self { enabled: true, max_attempts: 5, max_kept_bytes: 4 << 20 }
    }
}

impl Migration {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let bounds = [
            ("max_attempts", u64::from(self.max_attempts), 1..=100),
            ("max_kept_bytes", self.max_kept_bytes as u64, 64 << 10..=1 << 32),
        ];
        let wrong = bounds.into_iter().find(|(_, value, allowed)| !allowed.contains(value));
        wrong.map_or(Ok(()), |(key, value, allowed)| Err(ConfigError::Migration { key, value, allowed }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_within_bounds_and_what_is_not_is_named_with_its_bounds() {
        Migration::default().check().unwrap();
        let refused = |migration: Migration| migration.check().unwrap_err().to_string();
        let says = refused(Migration { max_attempts: 0, ..Migration::default() });
        assert_eq!(says, "migration.max_attempts is 0; use 1 to 100");
        assert!(refused(Migration { max_kept_bytes: 1, ..Migration::default() }).contains("migration.max_kept_bytes is 1"));
        assert!(toml::from_str::<Migration>("attempts = 3").unwrap_err().to_string().contains("max_attempts"));
    }
}
