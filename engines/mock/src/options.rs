//! Options: everything that a mock engine is told, as a plain struct and as the parameters of a `mock://` URL.

use serde_json::{Map, Number, Value};

use crate::model::{Profile, ProfileError};

/// What a mock engine is.
#[derive(Clone, Debug, PartialEq)]
pub struct MockOptions {
    /// Name of the engine, for error messages.
    pub name: String,
    /// Name of the model that it serves.
    pub model: String,
    /// Output tokens of a chat whose request does not limit them; it then ends with `stop`.
    pub chat_tokens: u32,
    /// Capacity and speed.
    pub profile: Profile,
}

impl Default for MockOptions {
    fn default() -> Self {
        Self { name: "mock".to_owned(), model: "mock".to_owned(), chat_tokens: 32, profile: Profile::default() }
    }
}

/// Options that cannot be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OptionsError {
    /// Not a URL of ours.
    #[error("engine URL {url:?} is not mock://NAME?KEY=VALUE&…; the keys are {}", MockOptions::keys().join(", "))]
    Url {
        /// What it was.
        url: String,
    },
    /// A parameter that does not exist.
    #[error("mock engine parameter {key:?} is not known; use {}", MockOptions::keys().join(", "))]
    UnknownKey {
        /// Which.
        key: String,
    },
    /// A value of the wrong kind.
    #[error("mock engine parameter {key}={value:?} is not possible; use {accepted}")]
    Value {
        /// Of which parameter.
        key: String,
        /// What it was.
        value: String,
        /// What it may be.
        accepted: &'static str,
    },
    /// Values that do not fit together.
    #[error(transparent)]
    Profile(#[from] ProfileError),
}

impl MockOptions {
    /// Reads `mock://NAME?KEY=VALUE&…`.
    ///
    /// # Errors
    /// Names the parameter that is not known or not possible, and what is.
    pub fn from_url(url: &str) -> Result<Self, OptionsError> {
        let rest = url.strip_prefix("mock://").ok_or_else(|| OptionsError::Url { url: url.to_owned() })?;
        let (name, query) = rest.split_once('?').unwrap_or((rest, ""));
        let name = name.trim_end_matches('/');
        if name.is_empty() || name.contains(['/', '#']) {
            return Err(OptionsError::Url { url: url.to_owned() });
        }
        let mut options = Self { name: name.to_owned(), ..Self::default() };
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            options.set(&key, &value)?;
        }
        options.profile.validate()?;
        Ok(options)
    }

    /// Sets one parameter from text. Whether the values fit together is checked when the engine starts.
    ///
    /// # Errors
    /// If there is no such parameter, or the value is of the wrong kind.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), OptionsError> {
        let wrong = |accepted| OptionsError::Value { key: key.to_owned(), value: value.to_owned(), accepted };
        match key {
            "model" if value.is_empty() => return Err(wrong("the name of a model")),
            "model" => value.clone_into(&mut self.model),
            "chat_tokens" => {
                self.chat_tokens = value.parse().ok().filter(|&n| n > 0).ok_or_else(|| wrong("a whole number of at least 1"))?;
            }
            _ => {
                let mut fields = fields(&self.profile);
                let field = fields.get_mut(key).ok_or_else(|| OptionsError::UnknownKey { key: key.to_owned() })?;
                let accepted = if field.is_u64() { "a whole number" } else { "a number" };
                *field = Value::Number(value.parse::<Number>().map_err(|_| wrong(accepted))?);
                self.profile = serde_json::from_value(Value::Object(fields)).map_err(|_| wrong(accepted))?;
            }
        }
        Ok(())
    }

    /// Parameters that exist.
    #[must_use]
    pub fn keys() -> Vec<String> {
        ["model".to_owned(), "chat_tokens".to_owned()]
            .into_iter()
            .chain(fields(&Profile::default()).into_iter().map(|(key, _)| key))
            .collect()
    }
}

fn fields(profile: &Profile) -> Map<String, Value> {
    match serde_json::to_value(profile) {
        Ok(Value::Object(fields)) => fields,
        other => unreachable!("a struct of numbers serializes to an object, not {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_can_be_set_by_url() {
        let url = "mock://gpu-0?model=Qwen%2FQwen3&block_size=32&speedup=2.5&chat_tokens=7&prefill_ms_base=0";
        let options = MockOptions::from_url(url).unwrap();
        let profile = Profile { block_size: 32, speedup: 2.5, prefill_ms_base: 0.0, ..Profile::default() };
        let expected = MockOptions { name: "gpu-0".to_owned(), model: "Qwen/Qwen3".to_owned(), chat_tokens: 7, profile };
        assert_eq!(options, expected);
        let mut all = MockOptions::default();
        for key in MockOptions::keys() {
            all.set(&key, "17").unwrap();
        }
        assert_eq!((all.model.as_str(), all.chat_tokens, all.profile.max_model_len, all.profile.speedup), ("17", 17, 17, 17.0));
    }

    #[track_caller]
    fn check_refused(url: &str, expected: &str) {
        let error = MockOptions::from_url(url).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn what_cannot_be_says_what_can() {
        check_refused("http://a", "is not mock://NAME?KEY=VALUE");
        check_refused("mock://?model=m", "is not mock://NAME?KEY=VALUE");
        check_refused("mock://a?blocksize=1", "\"blocksize\" is not known; use model, chat_tokens, block_size,");
        check_refused("mock://a?block_size=1.5", "block_size=\"1.5\" is not possible; use a whole number");
        check_refused("mock://a?speedup=fast", "speedup=\"fast\" is not possible; use a number");
        check_refused("mock://a?model=", "use the name of a model");
        check_refused("mock://a?chat_tokens=0", "at least 1");
        check_refused("mock://a?kv_blocks=1", "raise kv_blocks or lower max_model_len");
    }
}
