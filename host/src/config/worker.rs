//! A worker as it is written, in the configuration file, in a file of its own or on the command line; and as it is run.
//!
//! Secrets are never shown: what prints a configuration says where a token comes from, not what it is.

use std::{collections::BTreeMap, env, fmt, fs, path::PathBuf, str::FromStr};

use super::profile;
use dynamo_engine_api::Protocol;
pub(crate) use dynamo_engine_openai::Kind;
use dynamo_engine_openai::{KvEndpoint, KvEvents, UnknownKind};
use dynamo_host_core::Role;
use serde::Deserialize;

/// Longest name of a worker or a model.
const MAX_NAME_BYTES: usize = 256;
/// Largest token of an engine.
const MAX_BEARER_BYTES: usize = 16 << 10;
/// Most data-parallel ranks of an engine.
pub(crate) const MAX_RANKS: u32 = 1024;
/// Most tokens of a KV block.
const MAX_BLOCK_SIZE: u32 = 1 << 20;
/// Most requests that a worker runs at once.
const MAX_RUNNING: u32 = 1_000_000;

/// The form of `--worker`.
pub(super) const FLAG_FORM: &str = "write URL[,KEY=VALUE…] with the keys name, model, role, handoff, bootstrap_host, bootstrap_port, kind, ranks, block_size, \
                                    max_running, bearer_env, bearer_file, ca_file, forward_priority, profile, kv_events, kv_replay, kv_topic, label.NAME";

/// Where the token that an engine demands comes from.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Bearer {
    /// It stands in the configuration.
    Written(String),
    /// The content of a file.
    File(PathBuf),
    /// A variable of the host's environment.
    Environment(String),
}

impl Bearer {
    /// The token.
    ///
    /// # Errors
    /// Says which key is wrong and why.
    pub(crate) fn read(&self) -> Result<String, String> {
        let (token, origin) = match self {
            Self::Written(token) => (token.clone(), "bearer".to_owned()),
            Self::File(path) => {
                let token = fs::read_to_string(path).map_err(|error| format!("bearer_file {path:?} cannot be read: {error}"))?;
                (token.trim().to_owned(), format!("bearer_file {path:?}"))
            }
            Self::Environment(name) => {
                let token = env::var(name).map_err(|_| format!("bearer_env {name:?} is not set in the host's environment"))?;
                (token, format!("bearer_env {name:?}"))
            }
        };
        let is_token = !token.is_empty() && token.len() <= MAX_BEARER_BYTES && token.bytes().all(|byte| byte.is_ascii_graphic());
        if is_token { Ok(token) } else { Err(format!("{origin} holds no token: use visible ASCII characters, without spaces")) }
    }
}

impl fmt::Display for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Written(_) => f.write_str("(set)"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
        }
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A worker as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct WrittenWorker {
    pub(crate) url: String,
    pub(crate) name: Option<String>,
    pub(crate) model: Option<String>,
    pub(crate) role: Role,
    pub(crate) handoff: Option<String>,
    pub(crate) bootstrap_host: Option<String>,
    pub(crate) bootstrap_port: Option<u16>,
    pub(crate) kind: Option<Kind>,
    pub(crate) ranks: Option<u32>,
    pub(crate) block_size: Option<u32>,
    pub(crate) max_running: Option<u32>,
    pub(crate) bearer: Option<String>,
    pub(crate) bearer_file: Option<PathBuf>,
    pub(crate) bearer_env: Option<String>,
    pub(crate) ca_file: Option<PathBuf>,
    pub(crate) forward_priority: bool,
    /// What `dynamo-host profile` wrote of the engine.
    pub(crate) profile: Option<PathBuf>,
    pub(crate) kv_events: Option<String>,
    pub(crate) kv_replay: Option<String>,
    pub(crate) kv_topic: Option<String>,
    pub(crate) labels: BTreeMap<String, String>,
}

/// An engine to serve with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WorkerConfig {
    pub(crate) url: String,
    /// Unique within a host.
    pub(crate) name: String,
    /// Learnt from the engine if `None`.
    pub(crate) model: Option<String>,
    pub(crate) role: Role,
    /// How it hands KV over, if it is one of several that do; by its kind if `None`.
    pub(crate) handoff: Option<Protocol>,
    /// Where decode engines find it, if that is another host than its URL's, or another port than usual.
    pub(crate) bootstrap_host: Option<String>,
    pub(crate) bootstrap_port: Option<u16>,
    /// Guessed from the engine's answers if `None`.
    pub(crate) kind: Option<Kind>,
    /// Data-parallel ranks; learnt from the engine if `None`.
    pub(crate) ranks: Option<u32>,
    /// Tokens per KV block; learnt from the engine if `None`.
    pub(crate) block_size: Option<u32>,
    /// Requests that each of its workers is given at once; what the engine reports counts if `None`.
    pub(crate) max_running: Option<u32>,
    pub(crate) bearer: Option<Bearer>,
    /// Certificates that this engine's is verified against, beside the system's.
    pub(crate) ca_file: Option<PathBuf>,
    /// Whether requests' priorities are said to the engine.
    pub(crate) forward_priority: bool,
    /// How its KV events are found.
    pub(crate) kv: KvEventsConfig,
    pub(crate) labels: BTreeMap<String, String>,
}

/// How an engine's KV events are found, and where they are replayed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KvEventsConfig {
    pub(crate) events: KvEvents,
    pub(crate) replay: Option<KvEndpoint>,
    pub(crate) topic: String,
}

impl WorkerConfig {
    /// Whether both are one connection to one engine: a change from one to the other leaves what runs as it is.
    pub(crate) fn is_same_engine(&self, other: &Self) -> bool {
        let connection = |config: &Self| {
            let Self { url, kind, handoff, bootstrap_host, bootstrap_port, bearer, ca_file, forward_priority, kv, .. } =
                config.clone();
            (url, kind, (handoff, bootstrap_host, bootstrap_port), bearer, ca_file, forward_priority, kv)
        };
        connection(self) == connection(other)
    }
}

impl TryFrom<WrittenWorker> for WorkerConfig {
    /// Which key is wrong, and how to fix it.
    type Error = String;

    fn try_from(written: WrittenWorker) -> Result<Self, String> {
        let kv = KvEventsConfig::of(&written)?;
        let handoff = handoff(&written)?;
        let WrittenWorker {
            url,
            name,
            model,
            role,
            bootstrap_host,
            bootstrap_port,
            kind,
            ranks,
            block_size,
            max_running,
            ca_file,
            forward_priority,
            profile,
            mut labels,
            ..
        } = written;
        if !url.contains("://") {
            return Err(format!("url {url:?} is no URL such as http://127.0.0.1:8000"));
        }
        let name = name.unwrap_or_else(|| authority(&url).to_owned());
        for (key, value) in [("name", Some(&name)), ("model", model.as_ref())] {
            let is_name =
                |value: &String| !value.is_empty() && value.len() <= MAX_NAME_BYTES && !value.chars().any(char::is_control);
            if value.is_some_and(|value| !is_name(value)) {
                return Err(format!("{key} is empty, too long or not on one line; use at most {MAX_NAME_BYTES} bytes of text"));
            }
        }
        for (key, value, most) in
            [("ranks", ranks, MAX_RANKS), ("block_size", block_size, MAX_BLOCK_SIZE), ("max_running", max_running, MAX_RUNNING)]
        {
            if let Some(value) = value
                && !(1..=most).contains(&value)
            {
                return Err(format!("{key} is {value}; use 1 to {most}"));
            }
        }
        if kind.is_some() && url.starts_with("mock://") {
            return Err("kind is for engines behind http:// and https://; remove it from a mock engine".to_owned());
        }
        let bearers = [
            written.bearer.map(Bearer::Written),
            written.bearer_file.map(Bearer::File),
            written.bearer_env.map(Bearer::Environment),
        ];
        let mut bearers = bearers.into_iter().flatten();
        let bearer = bearers.next();
        if bearers.next().is_some() {
            return Err("more than one of bearer, bearer_file and bearer_env is set; use one".to_owned());
        }
        for (label, value) in profile::labels(&url, profile.as_deref())? {
            // What the operator says of a worker stands.
            labels.entry(label).or_insert(value);
        }
        Ok(Self {
            url,
            name,
            model,
            role,
            handoff,
            bootstrap_host,
            bootstrap_port,
            kind,
            ranks,
            block_size,
            max_running,
            bearer,
            ca_file,
            forward_priority,
            kv,
            labels,
        })
    }
}

/// How a worker hands KV over, if it is written.
fn handoff(written: &WrittenWorker) -> Result<Option<Protocol>, String> {
    let WrittenWorker { url, role, bootstrap_host, bootstrap_port, .. } = written;
    let protocol = written.handoff.as_deref().map(str::parse::<Protocol>).transpose()?;
    let has_bootstrap = bootstrap_host.is_some() || bootstrap_port.is_some();
    if *role == Role::Aggregated && (protocol.is_some() || has_bootstrap) {
        return Err(
            "handoff, bootstrap_host and bootstrap_port go with role prefill, decode or both; set one of these, or remove \
                    them"
                .to_owned(),
        );
    }
    if url.starts_with("mock://") && (protocol.is_some_and(|protocol| protocol != Protocol::Nixl) || has_bootstrap) {
        return Err("a mock engine hands KV over by nixl; remove handoff, bootstrap_host and bootstrap_port".to_owned());
    }
    let is_host = |host: &String| !host.is_empty() && host.chars().all(|c| c.is_ascii_graphic() && !"/?#@,".contains(c));
    if let Some(host) = bootstrap_host.as_ref().filter(|host| !is_host(host)) {
        return Err(format!("bootstrap_host is {host:?}; use a name or an address, without a port"));
    }
    match protocol {
        _ if *bootstrap_port == Some(0) => Err("bootstrap_port is 0; use 1 to 65535".to_owned()),
        Some(protocol @ (Protocol::Nixl | Protocol::Context)) if has_bootstrap => Err(format!(
            "bootstrap_host and bootstrap_port go with handoff bootstrap or mooncake, and it is {protocol}; remove one of them"
        )),
        _ => Ok(protocol),
    }
}

impl KvEventsConfig {
    fn of(written: &WrittenWorker) -> Result<Self, String> {
        let endpoint =
            |key: &str, text: &str, form: &str| text.parse::<KvEndpoint>().map_err(|_| format!("{key} is {text:?}; use {form}"));
        let form = "off, tcp://HOST:PORT where the engine publishes, or bind:tcp://ADDRESS:PORT where it connects to";
        let events = match written.kv_events.as_deref() {
            None => KvEvents::Asked,
            Some("off") => KvEvents::Off,
            Some(text) => match text.strip_prefix("bind:") {
                Some(address) => KvEvents::ConnectHere(endpoint("kv_events", address, form)?),
                None => KvEvents::At(endpoint("kv_events", text, form)?),
            },
        };
        let replay = written.kv_replay.as_ref().map(|text| endpoint("kv_replay", text, "tcp://HOST:PORT")).transpose()?;
        let is_at = matches!(events, KvEvents::At(_) | KvEvents::ConnectHere(_));
        if !is_at && (replay.is_some() || written.kv_topic.is_some()) {
            return Err("kv_replay and kv_topic go with kv_events=tcp://HOST:PORT; set that too, or remove them".to_owned());
        }
        if is_at && written.url.starts_with("mock://") {
            return Err("a mock engine in this process tells of its KV without publishing; remove kv_events".to_owned());
        }
        Ok(Self { events, replay, topic: written.kv_topic.clone().unwrap_or_default() })
    }
}

/// Reads the form of `--worker`.
impl FromStr for WorkerConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let mut worker = WrittenWorker { url: parts.next().unwrap_or_default().to_owned(), ..WrittenWorker::default() };
        if !worker.url.contains("://") {
            return Err("it does not begin with a URL such as http://127.0.0.1:8000".to_owned());
        }
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("{part:?} is not KEY=VALUE"))?;
            let number = || value.parse().map_err(|_| format!("{key} is {value:?}; use a whole number"));
            match key {
                _ if value.is_empty() => return Err(format!("{key} is empty")),
                "name" => worker.name = Some(value.to_owned()),
                "model" => worker.model = Some(value.to_owned()),
                "role" => worker.role = value.parse()?,
                "handoff" => worker.handoff = Some(value.to_owned()),
                "bootstrap_host" => worker.bootstrap_host = Some(value.to_owned()),
                "bootstrap_port" => {
                    let port = value.parse().map_err(|_| format!("{key} is {value:?}; use 1 to 65535"))?;
                    worker.bootstrap_port = Some(port);
                }
                "kind" => worker.kind = Some(value.parse().map_err(|error: UnknownKind| error.to_string())?),
                "ranks" => worker.ranks = Some(number()?),
                "block_size" => worker.block_size = Some(number()?),
                "max_running" => worker.max_running = Some(number()?),
                // Whoever lists processes sees the command line.
                "bearer" => return Err("a token has no place on the command line; use bearer_env or bearer_file".to_owned()),
                "bearer_env" => worker.bearer_env = Some(value.to_owned()),
                "bearer_file" => worker.bearer_file = Some(value.into()),
                "kv_events" => worker.kv_events = Some(value.to_owned()),
                "kv_replay" => worker.kv_replay = Some(value.to_owned()),
                "kv_topic" => worker.kv_topic = Some(value.to_owned()),
                "ca_file" => worker.ca_file = Some(value.into()),
                "profile" => worker.profile = Some(value.into()),
                "forward_priority" => {
                    worker.forward_priority = value.parse().map_err(|_| format!("{key} is {value:?}; use true or false"))?;
                }
                _ => match key.strip_prefix("label.") {
                    Some(label) if !label.is_empty() => drop(worker.labels.insert(label.to_owned(), value.to_owned())),
                    _ => return Err(format!("{key:?} is not known")),
                },
            }
        }
        worker.try_into()
    }
}

/// `host:port` of a URL, or the name of a mock engine.
fn authority(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split(['/', '?']).next().unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(text: &str) -> Result<WorkerConfig, String> {
        text.parse()
    }

    fn written(text: &str) -> Result<WorkerConfig, String> {
        toml::from_str::<WrittenWorker>(text).map_err(|error| error.to_string())?.try_into()
    }

    #[test]
    fn a_worker_is_a_url_with_what_is_known_of_it() {
        let parsed = worker(
            "http://10.0.0.1:8000/v1,model=m,label.zone=a,label.price=1.5,kind=vllm,ranks=4,block_size=32,max_running=9,bearer_env=T,\
             ca_file=/c.pem,forward_priority=true",
        )
        .unwrap();
        assert_eq!((parsed.name.as_str(), parsed.model.as_deref(), parsed.kind), ("10.0.0.1:8000", Some("m"), Some(Kind::Vllm)));
        assert_eq!((parsed.ranks, parsed.block_size, parsed.forward_priority), (Some(4), Some(32), true));
        assert_eq!(parsed.max_running, Some(9));
        assert_eq!((parsed.labels["price"].as_str(), parsed.ca_file), ("1.5", Some("/c.pem".into())));
        assert_eq!(parsed.bearer, Some(Bearer::Environment("T".to_owned())));
        assert_eq!(worker("mock://a?model=m&speedup=10").unwrap().name, "a");
    }

    #[test]
    fn a_worker_has_a_role_and_a_way_of_handing_kv_over() {
        let split = worker("http://h:1,role=prefill,handoff=bootstrap,bootstrap_port=9000").unwrap();
        assert_eq!((split.role, split.handoff, split.bootstrap_port), (Role::Prefill, Some(Protocol::Bootstrap), Some(9000)));
        let found = written("url = 'http://h'\nrole = 'both'").unwrap();
        assert_eq!((found.role, found.handoff, found.bootstrap_port), (Role::Both, None, None));
        assert!(!split.is_same_engine(&WorkerConfig { bootstrap_port: None, ..split.clone() }));
        assert!(split.is_same_engine(&WorkerConfig { role: Role::Both, ..split.clone() }), "what runs goes on");
        assert_eq!(worker("mock://h,role=decode,handoff=nixl").unwrap().handoff, Some(Protocol::Nixl));
    }

    #[test]
    fn a_wrong_worker_says_what_is_wrong() {
        for (text, says) in [
            ("localhost:80", "does not begin with a URL"),
            ("http://h,modle=x", "\"modle\" is not known"),
            ("http://h,model", "not KEY=VALUE"),
            ("http://h,model=", "model is empty"),
            ("http://h,role=chef", "use aggregated, prefill, decode or both"),
            ("http://h,role=both,handoff=carrier-pigeon", "use nixl, mooncake, bootstrap or context"),
            ("http://h,handoff=nixl", "go with role prefill, decode or both"),
            ("http://h,role=prefill,handoff=nixl,bootstrap_port=8998", "bootstrap_port go with handoff bootstrap or mooncake"),
            ("http://h,role=prefill,bootstrap_port=0", "bootstrap_port is 0; use 1 to 65535"),
            ("http://h,role=prefill,bootstrap_host=h:1/x", "use a name or an address"),
            ("http://h,role=prefill,bootstrap_port=99999", "use 1 to 65535"),
            ("mock://h,role=prefill,handoff=context", "a mock engine hands KV over by nixl"),
            ("http://h,label.=x", "is not known"),
            ("http://h,kind=ollama", "use one of vllm, sglang"),
            ("mock://h,kind=vllm", "remove it from a mock engine"),
            ("http://h,ranks=0", "ranks is 0; use 1 to 1024"),
            ("http://h,ranks=two", "use a whole number"),
            ("http://h,max_running=0", "max_running is 0; use 1 to 1000000"),
            ("http://h,bearer=s3cret", "bearer_env or bearer_file"),
            ("http://h,forward_priority=yes", "use true or false"),
            ("http://h,kv_events=5557", "bind:tcp://ADDRESS:PORT"),
            ("http://h,kv_events=tcp://h:1,kv_replay=h:2", "kv_replay is \"h:2\"; use tcp://HOST:PORT"),
            ("http://h,kv_replay=tcp://h:2", "go with kv_events=tcp://HOST:PORT"),
            ("mock://h,kv_events=tcp://h:1", "remove kv_events"),
        ] {
            let error = worker(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(written("url = 'http://h'\nbearer = 'a'\nbearer_env = 'b'").unwrap_err().contains("use one"));
        assert!(written("url = 'h:8000'").unwrap_err().contains("no URL such as"));
        assert!(written("url = 'http://h'\nname = \"a\\nb\"").unwrap_err().contains("name"));
        assert!(written("url = 'http://h'\nkind = 'x'").unwrap_err().contains("sglang"));
    }

    #[test]
    fn a_token_is_read_where_it_is_and_never_shown() {
        let config = written("url = 'http://h'\nbearer = 's3cret'").unwrap();
        assert!(!format!("{config:?}").contains("s3cret"));
        assert_eq!(config.bearer.unwrap().read().unwrap(), "s3cret");
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        fs::write(&file, "s3cret\n").unwrap();
        assert_eq!(Bearer::File(file.clone()).read().unwrap(), "s3cret");
        fs::write(&file, "two words").unwrap();
        let error = Bearer::File(file).read().unwrap_err();
        assert!(error.contains("holds no token") && !error.contains("words"), "{error}");
        assert!(Bearer::Environment("DYNAMO_HOST_NO_SUCH".to_owned()).read().unwrap_err().contains("is not set"));
    }
}
