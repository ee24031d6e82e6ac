//! Options: everything that a mock engine is told, as a plain struct and as the parameters of a `mock://` URL.

use dynamo_engine_api::Role;
use dynamo_engine_kv_events::{Form, PublisherOptions};
use serde_json::{Map, Number, Value};

use crate::{
    faults::{FaultError, Faults},
    handoff::{self, HandoffOptions},
    model::{Profile, ProfileError},
    tokens::Script,
};

/// What a mock engine is.
#[derive(Clone, Debug, PartialEq)]
pub struct MockOptions {
    /// Name of the engine, for error messages.
    pub name: String,
    /// Name of the model that it serves.
    pub model: String,
    /// Output tokens of a chat whose request does not limit them; it then ends with `stop`.
    pub chat_tokens: u32,
    /// What stands between the tokens of its outputs.
    pub script: Script,
    /// Whether it goes on with a chat's last message if that is the assistant's, as llama.cpp does unasked.
    pub assistant_prefill: bool,
    /// What it does wrong from the start.
    pub faults: Faults,
    /// Whether it publishes KV events when it is served over HTTP.
    pub publishes_kv_events: bool,
    /// How it does that.
    pub publisher: PublisherOptions,
    /// Its part in hand-offs, when it is served over HTTP.
    pub handoff: HandoffOptions,
    /// Capacity and speed.
    pub profile: Profile,
}

/// Parameters that say how KV events are published.
const KV_KEYS: [&str; 6] = ["kv_events", "kv_replay", "kv_topic", "kv_form", "kv_buffer_steps", "kv_drop_every"];

/// What parameters begin with that are faults.
const FAULT: &str = "fault.";

impl Default for MockOptions {
    fn default() -> Self {
        let any_port = || "tcp://127.0.0.1:0".parse().expect("it is an endpoint");
        let publisher = PublisherOptions {
            endpoint: any_port(),
            connects: false,
            replay: Some(any_port()),
            topic: String::new(),
            buffer_steps: 10_000,
            form: Form::Map,
            drop_every: None,
        };
        let (name, model) = ("mock".to_owned(), "mock".to_owned());
        Self {
            name,
            model,
            chat_tokens: 32,
            script: Script::Ascii,
            assistant_prefill: false,
            faults: Faults::default(),
            publishes_kv_events: false,
            publisher,
            handoff: HandoffOptions::default(),
            profile: Profile::default(),
        }
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
    /// A part in hand-offs, which takes a server that others can reach.
    #[error(
        "mock engine parameter role={:?} is not possible in this process, where no other engine can fetch from it; \
         start `dynamo-host mock-engine --role {role}`, and give its http:// address",
        role.to_string()
    )]
    Role {
        /// Which.
        role: Role,
    },
    /// Values that do not fit together.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// A fault that it cannot have.
    #[error(transparent)]
    Fault(#[from] FaultError),
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
        if options.handoff.role != Role::Aggregated {
            return Err(OptionsError::Role { role: options.handoff.role });
        }
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
            "script" => {
                self.script = match value {
                    "ascii" => Script::Ascii,
                    "wide" => Script::Wide,
                    _ => return Err(wrong("ascii or wide")),
                };
            }
            "assistant_prefill" => self.assistant_prefill = value.parse().map_err(|_| wrong("true or false"))?,
            _ if key.starts_with(FAULT) => self.faults.set(&key[FAULT.len()..], value)?,
            _ if handoff::KEYS.contains(&key) => self.handoff.set(key, value).map_err(wrong)?,
            _ if KV_KEYS.contains(&key) => self.set_kv(key, value).map_err(wrong)?,
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

    /// Sets how KV events are published; returns what is accepted if this is not.
    fn set_kv(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        let publisher = &mut self.publisher;
        match (key, value) {
            ("kv_events", "off") => self.publishes_kv_events = false,
            ("kv_events", _) => {
                publisher.connects = value.starts_with("connect:");
                let endpoint = value.trim_start_matches("connect:").parse();
                publisher.endpoint = endpoint.map_err(|_| "off, tcp://HOST:PORT or connect:tcp://HOST:PORT")?;
                self.publishes_kv_events = true;
            }
            ("kv_replay", "off") => publisher.replay = None,
            ("kv_replay", _) => publisher.replay = Some(value.parse().map_err(|_| "off or tcp://HOST:PORT")?),
            ("kv_topic", _) => value.clone_into(&mut publisher.topic),
            ("kv_form", "map") => publisher.form = Form::Map,
            ("kv_form", "positional") => publisher.form = Form::Positional,
            ("kv_form", _) => return Err("map or positional"),
            ("kv_buffer_steps", _) => publisher.buffer_steps = value.parse().map_err(|_| "a whole number")?,
            _ => {
                let nth = value.parse().ok().filter(|&nth| nth > 1);
                publisher.drop_every = Some(nth.ok_or("a whole number of at least 2")?);
            }
        }
        Ok(())
    }

    /// Parameters that exist.
    #[must_use]
    pub fn keys() -> Vec<String> {
        ["model", "chat_tokens", "script", "assistant_prefill"]
            .map(str::to_owned)
            .into_iter()
            .chain(fields(&Profile::default()).into_iter().map(|(key, _)| key))
            .chain(KV_KEYS.map(str::to_owned))
            .chain(handoff::KEYS.map(str::to_owned))
            .chain(Faults::keys().into_iter().map(|key| format!("{FAULT}{key}")))
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
        let named = MockOptions { name: "gpu-0".to_owned(), model: "Qwen/Qwen3".to_owned(), ..MockOptions::default() };
        let expected = MockOptions { chat_tokens: 7, profile, ..named };
        assert_eq!(options, expected);
        let mut all = MockOptions::default();
        let no_number = |key: &str| {
            KV_KEYS.contains(&key)
                || key.starts_with(FAULT)
                || ["script", "assistant_prefill", "role", "kv_load_failure", "kv_mismatch"].contains(&key)
        };
        for key in MockOptions::keys().iter().filter(|key| !no_number(key)) {
            all.set(key, "17").unwrap();
        }
        assert_eq!((all.model.as_str(), all.chat_tokens, all.profile.max_model_len, all.profile.speedup), ("17", 17, 17, 17.0));
    }

    #[test]
    fn what_it_says_and_does_wrong_is_set_by_url() {
        let options = MockOptions::from_url("mock://a?script=wide&assistant_prefill=true&fault.cut=3&fault.next=1").unwrap();
        assert_eq!((options.script, options.assistant_prefill), (Script::Wide, true));
        assert_eq!(options.faults, Faults { cut: Some(3), next: Some(1), ..Faults::default() });
    }

    #[test]
    fn how_kv_events_are_published_is_set_by_url() {
        let url = "mock://a?kv_events=connect:tcp://10.0.0.1:5557&kv_replay=off&kv_topic=kv@a@m&kv_form=positional&\
                   kv_buffer_steps=5&kv_drop_every=3";
        let options = MockOptions::from_url(url).unwrap();
        let expected = PublisherOptions {
            endpoint: "tcp://10.0.0.1:5557".parse().unwrap(),
            connects: true,
            replay: None,
            topic: "kv@a@m".to_owned(),
            buffer_steps: 5,
            form: Form::Positional,
            drop_every: Some(3),
        };
        assert_eq!((options.publishes_kv_events, options.publisher), (true, expected));
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
        check_refused(
            "mock://a?blocksize=1",
            "\"blocksize\" is not known; use model, chat_tokens, script, assistant_prefill, block_size,",
        );
        check_refused("mock://a?block_size=1.5", "block_size=\"1.5\" is not possible; use a whole number");
        check_refused("mock://a?speedup=fast", "speedup=\"fast\" is not possible; use a number");
        check_refused("mock://a?model=", "use the name of a model");
        check_refused("mock://a?chat_tokens=0", "at least 1");
        check_refused("mock://a?kv_events=5557", "use off, tcp://HOST:PORT or connect:tcp://HOST:PORT");
        check_refused("mock://a?kv_form=json", "map or positional");
        check_refused("mock://a?kv_drop_every=1", "at least 2");
        check_refused("mock://a?script=latin", "use ascii or wide");
        check_refused("mock://a?role=prefil", "use aggregated, prefill, decode or both");
        check_refused("mock://a?role=prefill", "start `dynamo-host mock-engine --role prefill`");
        check_refused("mock://a?kv_load_failure=retry", "use fail or recompute");
        check_refused("mock://a?kv_mismatch=ignore", "use fail or die");
        check_refused("mock://a?kv_lease_seconds=-1", "seconds from 0");
        check_refused("mock://a?kv_latency_ms=soon", "milliseconds from 0");
        check_refused("mock://a?kv_bytes_per_second=0", "from 1, such as 64e9");
        check_refused("mock://a?assistant_prefill=yes", "use true or false");
        check_refused("mock://a?fault.fire=1", "fault \"fire\" is not known; use content_type, cut,");
        check_refused("mock://a?fault.slow=0.5", "slow=0.5");
        check_refused("mock://a?kv_blocks=1", "raise kv_blocks or lower max_model_len");
    }
}
