//! Configuration: a TOML file, and flags that override it. What was written and what is run are two types.
//!
//! Unknown keys are errors; a default is stated once, in [`Limits::default`] and [`Config::resolve`].

mod door;
mod limits;

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::Args;
use dynamo_host_core::{OnError, Role};
use serde::Deserialize;

use self::door::DoorSections;
pub(crate) use self::{
    door::{Cors, DoorConfig},
    limits::Limits,
};
use crate::{policies::Seed, telemetry::LogFormat, tls::TlsFiles, trace::Otlp};

/// A configuration that cannot be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("config file {path:?} cannot be read: {reason}")]
    Unreadable { path: PathBuf, reason: String },
    #[error("config file {path:?}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("--worker {text:?}: {reason}; write URL[,name=…][,model=…][,role=aggregated|prefill|decode][,label.KEY=VALUE]")]
    Worker { text: String, reason: String },
    #[error(
        "no worker is configured; give --worker URL, for example --worker http://127.0.0.1:8000 or --worker 'mock://a?model=demo'"
    )]
    NoWorker,
    #[error("role {role} of worker {name:?} is not served by this release; use aggregated")]
    Role { name: String, role: Role },
    #[error("{origin}: the settings are not JSON: {reason}; write an object such as {{\"key\": 1}}, or @FILE")]
    Settings { origin: &'static str, reason: String },
    #[error("routing settings are given, but no policy; name one with --routing FILE.wasm")]
    SettingsAlone,
    #[error(
        "admin address {address} can be reached from other machines, and no token is set; set --admin-token, or use 127.0.0.1"
    )]
    AdminOpen { address: SocketAddr },
    #[error("auth.keys_file and auth.tenant_header are both set, and a key names its tenant already; keep one of them")]
    TwoTenants,
    #[error("auth.tenant_header is {name:?}, which is no name of a header; write one such as x-tenant")]
    TenantHeader { name: String },
    #[error("cors.origins has {origin:?}; write SCHEME://HOST[:PORT], or \"*\" alone for any")]
    CorsOrigin { origin: String },
    #[error(transparent)]
    Otlp(#[from] crate::trace::OtlpError),
    #[error("limits.{key} is {value}; use {} to {}", allowed.start(), allowed.end())]
    Limit { key: &'static str, value: u64, allowed: RangeInclusive<u64> },
}

/// Flags of `serve`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ServeFlags {
    /// Configuration file (TOML); flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address of the front door [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// Address of the admin API [default: 127.0.0.1:8081]
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
    /// Token that the admin API demands; required unless it listens on loopback
    #[arg(long, value_name = "TOKEN", env = "DYNAMO_HOST_ADMIN_TOKEN", hide_env_values = true)]
    admin_token: Option<String>,
    /// An engine: URL[,name=…][,model=…][,role=…][,label.KEY=VALUE]; http://… or mock://NAME?model=…; may be repeated
    #[arg(long = "worker", value_name = "URL")]
    workers: Vec<String>,
    /// Routing policy to begin with: a component, or `native`. What was activated since wins after a restart
    #[arg(long, value_name = "FILE.wasm|native")]
    routing: Option<String>,
    /// Its settings: JSON, or @FILE
    #[arg(long, value_name = "JSON|@FILE")]
    routing_settings: Option<String>,
    /// What happens to requests that the routing policy fails to decide: fallback, last-good or closed [default: fallback]
    #[arg(long, value_name = "MODE")]
    routing_on_error: Option<OnError>,
    /// Directory that keeps active policies over restarts; without it nothing is kept
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// File of API keys (TOML), see dynamo-host key new; without it nobody is asked for one
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// Name the worker in the header x-dynamo-worker
    #[arg(long)]
    expose_worker: bool,
    /// Largest request body
    #[arg(long, value_name = "BYTES")]
    max_body_bytes: Option<usize>,
    /// How log lines look [default: pretty]
    #[arg(long, value_name = "FORMAT")]
    log: Option<LogFormat>,
    /// Log filter, as in RUST_LOG [default: info]
    #[arg(long, value_name = "FILTER")]
    log_level: Option<String>,
}

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    http: Option<SocketAddr>,
    admin: Option<SocketAddr>,
    admin_token: Option<String>,
    state_dir: Option<PathBuf>,
    expose_worker: bool,
    log: Option<LogFormat>,
    log_level: Option<String>,
    routing: Routing,
    auth: door::Auth,
    cors: Option<Cors>,
    tls: Option<TlsFiles>,
    admin_tls: Option<TlsFiles>,
    otlp: Option<Otlp>,
    limits: Limits,
    worker: Vec<FileWorker>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Routing {
    policy: Option<String>,
    settings: Option<toml::Table>,
    on_error: Option<OnError>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileWorker {
    url: String,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    role: Role,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// An engine to serve with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WorkerConfig {
    pub(crate) url: String,
    pub(crate) name: String,
    /// Learnt from the engine if `None`.
    pub(crate) model: Option<String>,
    pub(crate) role: Role,
    pub(crate) labels: BTreeMap<String, String>,
}

/// What is run.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) http: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) admin_token: Option<String>,
    pub(crate) workers: Vec<WorkerConfig>,
    pub(crate) routing: Option<Seed>,
    /// Wanted of the slot that routes, if anything is said.
    pub(crate) routing_on_error: Option<OnError>,
    pub(crate) state_dir: Option<PathBuf>,
    pub(crate) expose_worker: bool,
    pub(crate) log: LogFormat,
    pub(crate) log_level: String,
    pub(crate) limits: Limits,
    pub(crate) door: DoorConfig,
}

impl Config {
    /// Brings file and flags together.
    pub(crate) fn resolve(flags: ServeFlags) -> Result<Self, ConfigError> {
        let file = flags.config.as_deref().map(File::read).transpose()?.unwrap_or_default();
        let mut workers: Vec<WorkerConfig> = file.worker.into_iter().map(WorkerConfig::from).collect();
        for text in &flags.workers {
            workers.push(text.parse()?);
        }
        if workers.is_empty() {
            return Err(ConfigError::NoWorker);
        }
        if let Some(worker) = workers.iter().find(|worker| worker.role != Role::Aggregated) {
            return Err(ConfigError::Role { name: worker.name.clone(), role: worker.role });
        }
        let settings = match (flags.routing_settings, file.routing.settings) {
            (Some(text), _) => Some(read_settings("--routing-settings", &text)?),
            (None, Some(table)) => Some(
                serde_json::to_string(&table)
                    .map_err(|error| ConfigError::Settings { origin: "routing.settings", reason: error.to_string() })?,
            ),
            (None, None) => None,
        };
        let routing = match (flags.routing.or(file.routing.policy), settings) {
            (Some(name), None) if name == "native" => Some(Seed::Native),
            (Some(path), settings) if path != "native" => {
                Some(Seed::File { path: path.into(), settings: settings.unwrap_or_else(|| "{}".to_owned()) })
            }
            (_, Some(_)) => return Err(ConfigError::SettingsAlone),
            (_, None) => None,
        };
        let mut limits = file.limits;
        limits.max_body_bytes = flags.max_body_bytes.unwrap_or(limits.max_body_bytes);
        limits.check()?;
        let config = Self {
            http: flags.http.or(file.http).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8080))),
            admin: flags.admin.or(file.admin).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8081))),
            admin_token: flags.admin_token.or(file.admin_token).filter(|token| !token.is_empty()),
            workers,
            routing,
            routing_on_error: flags.routing_on_error.or(file.routing.on_error),
            state_dir: flags.state_dir.or(file.state_dir),
            expose_worker: flags.expose_worker || file.expose_worker,
            log: flags.log.or(file.log).unwrap_or_default(),
            log_level: flags.log_level.or(file.log_level).unwrap_or_else(|| "info".to_owned()),
            limits,
            door: DoorConfig::resolve(
                DoorSections { auth: file.auth, cors: file.cors, tls: file.tls, admin_tls: file.admin_tls, otlp: file.otlp },
                flags.keys,
            )?,
        };
        if config.admin_token.is_none() && !is_loopback(config.admin.ip()) {
            return Err(ConfigError::AdminOpen { address: config.admin });
        }
        Ok(config)
    }
}

impl File {
    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path)
            .map_err(|error| ConfigError::Unreadable { path: path.to_owned(), reason: error.to_string() })?;
        // toml names line, key, and what is accepted.
        toml::from_str(&text)
            .map_err(|error| ConfigError::File { path: path.to_owned(), reason: error.to_string().trim_end().to_owned() })
    }
}

impl From<FileWorker> for WorkerConfig {
    fn from(worker: FileWorker) -> Self {
        let FileWorker { url, name, model, role, labels } = worker;
        let name = name.unwrap_or_else(|| authority(&url).to_owned());
        Self { url, name, model, role, labels }
    }
}

impl FromStr for WorkerConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = |reason: String| ConfigError::Worker { text: text.to_owned(), reason };
        let mut parts = text.split(',');
        let url = parts.next().unwrap_or_default().to_owned();
        if !url.contains("://") {
            return Err(wrong("it does not begin with a URL such as http://127.0.0.1:8000".to_owned()));
        }
        let mut worker = FileWorker { url, name: None, model: None, role: Role::default(), labels: BTreeMap::new() };
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| wrong(format!("{part:?} is not KEY=VALUE")))?;
            match key {
                _ if value.is_empty() => return Err(wrong(format!("{key} is empty"))),
                "name" => worker.name = Some(value.to_owned()),
                "model" => worker.model = Some(value.to_owned()),
                "role" => worker.role = value.parse().map_err(wrong)?,
                _ => match key.strip_prefix("label.") {
                    Some(label) if !label.is_empty() => drop(worker.labels.insert(label.to_owned(), value.to_owned())),
                    _ => return Err(wrong(format!("{key:?} is not known"))),
                },
            }
        }
        Ok(worker.into())
    }
}

/// `host:port` of a URL, or the name of a mock engine.
fn authority(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split(['/', '?']).next().unwrap_or(rest)
}

/// Settings given as JSON or as @FILE, as a JSON text.
pub(crate) fn read_settings(origin: &'static str, text: &str) -> Result<String, ConfigError> {
    let text = match text.strip_prefix('@') {
        Some(path) => fs::read_to_string(path)
            .map_err(|error| ConfigError::Settings { origin, reason: format!("{path} cannot be read: {error}") })?,
        None => text.to_owned(),
    };
    let value: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&text).map_err(|error| ConfigError::Settings { origin, reason: error.to_string() })?;
    Ok(serde_json::Value::Object(value).to_string())
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(text: &str) -> Result<WorkerConfig, String> {
        text.parse().map_err(|error: ConfigError| error.to_string())
    }

    fn flags(workers: &[&str]) -> ServeFlags {
        ServeFlags { workers: workers.iter().map(|&worker| worker.to_owned()).collect(), ..ServeFlags::default() }
    }

    #[test]
    fn the_documented_file_is_one_and_shows_the_defaults() {
        let document = include_str!("../../docs/configuration.md");
        let example = document.split("```toml").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        let file: File = toml::from_str(example).unwrap();
        assert_eq!(file.limits, Limits::default());
        // What is shown as an alternative is one too.
        let all = example.lines().map(|line| line.strip_prefix("# ").unwrap_or(line)).collect::<Vec<_>>().join("\n");
        let file: File = toml::from_str(&all).unwrap();
        assert!(file.admin_token.is_some() && file.state_dir.is_some() && file.routing.settings.is_some());
        assert!(file.cors.is_some() && file.tls.is_some() && file.admin_tls.is_some() && file.otlp.is_some());
        assert!(file.worker[0].name.is_some() && file.worker[0].labels.len() == 2);
    }

    #[test]
    fn a_worker_is_a_url_with_what_is_known_of_it() {
        let parsed = worker("http://10.0.0.1:8000/v1,model=m,role=decode,label.zone=a,label.price=1.5").unwrap();
        assert_eq!((parsed.name.as_str(), parsed.model.as_deref(), parsed.role), ("10.0.0.1:8000", Some("m"), Role::Decode));
        assert_eq!(parsed.labels["price"], "1.5");
        assert_eq!(worker("mock://a?model=m&speedup=10").unwrap().name, "a");
    }

    #[test]
    fn a_wrong_worker_says_what_is_wrong_and_the_form() {
        for (text, says) in [
            ("localhost:80", "does not begin with a URL"),
            ("http://h,modle=x", "\"modle\" is not known"),
            ("http://h,model", "not KEY=VALUE"),
            ("http://h,model=", "model is empty"),
            ("http://h,role=both", "use aggregated, prefill or decode"),
            ("http://h,label.=x", "is not known"),
        ] {
            let error = worker(text).unwrap_err();
            assert!(error.contains(says) && error.contains("write URL"), "{error}");
        }
    }

    #[test]
    fn flags_override_the_file_and_unknown_keys_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("host.toml");
        fs::write(&path, "http = '127.0.0.1:1'\nadmin='127.0.0.1:2'\n[routing]\npolicy='x.wasm'\nsettings={a=1}\n[[worker]]\nurl='http://h:1'\n").unwrap();
        let with = |more: ServeFlags| Config::resolve(ServeFlags { config: Some(path.clone()), ..more });
        let config = with(ServeFlags { http: "127.0.0.1:3".parse().ok(), ..flags(&["http://h:2"]) }).unwrap();
        assert_eq!((config.http.port(), config.admin.port(), config.workers.len()), (3, 2, 2));
        assert_eq!(config.routing, Some(Seed::File { path: "x.wasm".into(), settings: "{\"a\":1}".to_owned() }));
        assert_eq!(config.routing_on_error, None);
        fs::write(&path, "[routing]\non_error = 'closed'\n[[worker]]\nurl='http://h:1'\n").unwrap();
        assert_eq!(with(flags(&[])).unwrap().routing_on_error, Some(OnError::Closed));
        let flagged = ServeFlags { routing_on_error: Some(OnError::LastGood), ..flags(&[]) };
        assert_eq!(with(flagged).unwrap().routing_on_error, Some(OnError::LastGood));
        fs::write(&path, "[limits]\nmax_body = 3\n").unwrap();
        let error = with(flags(&[])).unwrap_err().to_string();
        assert!(error.contains("max_body") && error.contains("max_body_bytes") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        let refused = |flags: ServeFlags| Config::resolve(flags).unwrap_err().to_string();
        assert!(refused(flags(&[])).contains("--worker"));
        let one = || flags(&["mock://a"]);
        assert!(refused(ServeFlags { admin: "0.0.0.0:1".parse().ok(), ..one() }).contains("--admin-token"));
        assert!(refused(ServeFlags { routing_settings: Some("{}".to_owned()), ..one() }).contains("--routing"));
        let settings = Some("{".to_owned());
        assert!(refused(ServeFlags { routing: Some("x".to_owned()), routing_settings: settings, ..one() }).contains("not JSON"));
        assert!(refused(flags(&["mock://a,role=prefill"])).contains("aggregated"));
    }
}
