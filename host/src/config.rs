//! Configuration: a TOML file, and flags that override it. What was written and what is run are two types.
//!
//! Unknown keys are errors; a default is stated once, in [`Limits::default`] and [`Config::resolve`]. What can change in a
//! running host is everything that [`Config::needs_restart`] does not name.

mod door;
mod health;
mod limits;
mod migration;
mod profile;
mod queue;
mod worker;

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use clap::Args;
use dynamo_host_core::OnError;
use serde::Deserialize;

use self::door::DoorSections;
#[cfg(any(feature = "kubernetes", doc))]
pub(crate) use self::worker::Kind;
pub(crate) use self::{
    door::{Cors, DoorConfig},
    health::{Canary, HealthConfig},
    limits::Limits,
    migration::Migration,
    queue::{MAX_CLASSES, QueueConfig, SloConfig},
    worker::{MAX_RANKS, WorkerConfig, WrittenWorker},
};
use crate::{
    discovery::Discovery,
    kv::KvConfig,
    models::{ModelNames, NameConfig, NamesError, TokenizerSource},
    policies::{Seed, Wishes},
    receipts::ReceiptsConfig,
    telemetry::LogFormat,
    tls::TlsFiles,
    trace::Otlp,
};

/// A configuration that cannot be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("config file {path:?} cannot be read: {reason}")]
    Unreadable { path: PathBuf, reason: String },
    #[error("config file {path:?}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("--worker {text:?}: {reason}; {}", worker::FLAG_FORM)]
    Worker { text: String, reason: String },
    #[error("worker {which} of config file {path:?}: {reason}")]
    FileWorker { path: PathBuf, which: String, reason: String },
    #[error(
        "no worker is configured; give --worker URL, for example --worker http://127.0.0.1:8000 or --worker 'mock://a?model=demo', \
         or --discovery"
    )]
    NoWorker,
    #[error("discovery {text:?}: {reason}")]
    Discovery { text: String, reason: String },
    #[error(transparent)]
    Names(#[from] NamesError),
    #[error(
        "--model {text:?}: {reason}; write NAME=DIR, with the name that engines list, and the directory of its tokenizer.json"
    )]
    Model { text: String, reason: &'static str },
    #[error("{origin}: the settings are not JSON: {reason}; write an object such as {{\"key\": 1}}, or @FILE")]
    Settings { origin: String, reason: String },
    #[error("{slot} settings are given, but no policy; name one with --{slot} FILE.wasm")]
    SettingsAlone { slot: &'static str },
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
    #[error("{0}")]
    Receipts(String),
    #[error("{0}")]
    Health(String),
    #[error("receipts are on, and there is nowhere to write them; set --state-dir, or use --receipts off")]
    ReceiptsNowhere,
    #[error("migration.{key} is {value}; use {} to {}", allowed.start(), allowed.end())]
    Migration { key: &'static str, value: u64, allowed: RangeInclusive<u64> },
    #[error("limits.{key} is {value}; use {} to {}", allowed.start(), allowed.end())]
    Limit { key: &'static str, value: u64, allowed: RangeInclusive<u64> },
    #[error("{0}")]
    Queue(String),
}

/// Flags of `serve`.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
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
    /// An engine: URL[,name=…][,model=…][,kind=…][,ranks=…][,label.KEY=VALUE]; http://… or mock://NAME?model=…; may be repeated
    #[arg(long = "worker", value_name = "URL")]
    workers: Vec<String>,
    /// Where workers come and go: file:DIRECTORY or kubernetes:NAMESPACE/SELECTOR; may be repeated
    #[arg(long, value_name = "SOURCE")]
    discovery: Vec<String>,
    /// Where a model's tokenizer is: the directory of its tokenizer.json, or `engine` to ask one of its engines; may be repeated
    #[arg(long = "model", value_name = "NAME=DIR|engine")]
    models: Vec<String>,
    /// Routing policy to begin with: a component, or `native`. What was activated since wins after a restart
    #[arg(long, value_name = "FILE.wasm|native")]
    routing: Option<String>,
    /// Its settings: JSON, or @FILE
    #[arg(long, value_name = "JSON|@FILE")]
    routing_settings: Option<String>,
    /// What happens to requests that the routing policy fails to decide: fallback, last-good or closed [default: fallback]
    #[arg(long, value_name = "MODE")]
    routing_on_error: Option<OnError>,
    /// Admission policy to begin with: a component, or `native`, which admits all. As with --routing
    #[arg(long, value_name = "FILE.wasm|native")]
    admission: Option<String>,
    /// Its settings: JSON, or @FILE
    #[arg(long, value_name = "JSON|@FILE")]
    admission_settings: Option<String>,
    /// What happens to requests that the admission policy fails to decide: open, last-good or closed [default: open]
    #[arg(long, value_name = "MODE")]
    admission_on_error: Option<OnError>,
    /// Directory that keeps active policies over restarts; without it nothing is kept
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Whether decisions are written down in the state directory: on or off [default: on if there is one]
    #[arg(long, value_name = "on|off")]
    receipts: Option<Switch>,
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

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
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
    discovery: Vec<String>,
    routing: SlotSection,
    admission: SlotSection,
    receipts: ReceiptsConfig,
    auth: door::Auth,
    cors: Option<Cors>,
    tls: Option<TlsFiles>,
    admin_tls: Option<TlsFiles>,
    otlp: Option<Otlp>,
    models: BTreeMap<String, NameConfig>,
    kv: KvConfig,
    health: HealthConfig,
    limits: Limits,
    queue: QueueConfig,
    slo: SloConfig,
    migration: Migration,
    worker: Vec<WrittenWorker>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SlotSection {
    policy: Option<String>,
    settings: Option<toml::Table>,
    on_error: Option<OnError>,
}

/// What a slot begins with, if anything is said.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SlotConfig {
    pub(crate) seed: Option<Seed>,
    pub(crate) on_error: Option<OnError>,
}

impl SlotSection {
    /// What flags say wins. `slot` is their beginning, and the section's name.
    fn resolve(
        self,
        slot: &'static str,
        policy: Option<String>,
        settings: Option<String>,
        on_error: Option<OnError>,
    ) -> Result<SlotConfig, ConfigError> {
        let settings = match (settings, self.settings) {
            (Some(text), _) => Some(read_settings(&format!("--{slot}-settings"), &text)?),
            (None, Some(table)) => Some(
                serde_json::to_string(&table)
                    .map_err(|error| ConfigError::Settings { origin: format!("{slot}.settings"), reason: error.to_string() })?,
            ),
            (None, None) => None,
        };
        let seed = match (policy.or(self.policy), settings) {
            (Some(name), None) if name == "native" => Some(Seed::Native),
            (Some(path), settings) if path != "native" => {
                Some(Seed::File { path: path.into(), settings: settings.unwrap_or_else(|| "{}".to_owned()) })
            }
            (_, Some(_)) => return Err(ConfigError::SettingsAlone { slot }),
            (_, None) => None,
        };
        Ok(SlotConfig { seed, on_error: on_error.or(self.on_error) })
    }
}

impl SlotConfig {
    pub(crate) fn wishes(&self) -> Wishes<'_> {
        Wishes { seed: self.seed.as_ref(), on_error: self.on_error }
    }
}

/// What is run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    /// What it was made of, to make it anew when the file has changed.
    flags: ServeFlags,
    pub(crate) http: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) admin_token: Option<String>,
    pub(crate) workers: Vec<WorkerConfig>,
    pub(crate) discovery: Vec<Discovery>,
    pub(crate) models: ModelNames,
    /// Where the tokens of prompts come from, by model.
    pub(crate) tokenizers: BTreeMap<String, TokenizerSource>,
    pub(crate) routing: SlotConfig,
    pub(crate) admission: SlotConfig,
    pub(crate) state_dir: Option<PathBuf>,
    pub(crate) expose_worker: bool,
    pub(crate) log: LogFormat,
    pub(crate) log_level: String,
    pub(crate) kv: KvConfig,
    pub(crate) health: HealthConfig,
    pub(crate) limits: Limits,
    pub(crate) queue: QueueConfig,
    pub(crate) slo: SloConfig,
    pub(crate) migration: Migration,
    pub(crate) door: DoorConfig,
    /// `None`: off.
    pub(crate) receipts: Option<ReceiptsConfig>,
}

impl Config {
    /// Brings file and flags together, to be served.
    pub(crate) fn resolve(flags: ServeFlags) -> Result<Self, ConfigError> {
        let config = Self::read(flags)?;
        if config.workers.is_empty() && config.discovery.is_empty() {
            return Err(ConfigError::NoWorker);
        }
        Ok(config)
    }

    /// Reads a file as it would be served without flags. It may have no workers: flags can bring them.
    pub(crate) fn of_file(path: &Path) -> Result<Self, ConfigError> {
        Self::read(ServeFlags { config: Some(path.to_owned()), ..ServeFlags::default() })
    }

    /// Makes it anew, of the file as it is now and the same flags.
    pub(crate) fn again(&self) -> Result<Self, ConfigError> {
        Self::resolve(self.flags.clone())
    }

    /// The configuration file.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.flags.config.as_deref()
    }

    /// Keys that differ from a running host's and that it cannot change while it runs.
    pub(crate) fn needs_restart(&self, running: &Self) -> Vec<&'static str> {
        let mut keys: Vec<&'static str> = [
            ("http", self.http != running.http),
            ("admin", self.admin != running.admin),
            ("admin_token", self.admin_token != running.admin_token),
            ("state_dir", self.state_dir != running.state_dir),
            ("expose_worker", self.expose_worker != running.expose_worker),
            ("log", self.log != running.log),
            ("discovery", self.discovery != running.discovery),
            ("models.*.tokenizer", self.tokenizers != running.tokenizers),
            ("routing", self.routing != running.routing),
            ("admission", self.admission != running.admission),
            ("kv", self.kv != running.kv),
            ("auth", self.door.keys_file != running.door.keys_file || self.door.tenant_header != running.door.tenant_header),
            ("cors", self.door.cors != running.door.cors),
            ("tls", self.door.tls != running.door.tls),
            ("admin_tls", self.door.admin_tls != running.door.admin_tls),
            ("otlp", self.door.otlp != running.door.otlp),
            ("receipts", self.receipts != running.receipts),
        ]
        .into_iter()
        .filter_map(|(key, differs)| differs.then_some(key))
        .collect();
        keys.extend(self.limits.fixed_that_differ(&running.limits));
        keys
    }

    fn read(flags: ServeFlags) -> Result<Self, ConfigError> {
        let mut file = flags.config.as_deref().map(File::read).transpose()?.unwrap_or_default();
        let flags_given = flags.clone();
        let mut workers: Vec<WorkerConfig> = Vec::with_capacity(file.worker.len() + flags.workers.len());
        for (index, written) in file.worker.into_iter().enumerate() {
            let which = written.name.clone().map_or_else(|| format!("{}", index + 1), |name| format!("{name:?}"));
            let path = || flags.config.clone().unwrap_or_default();
            workers.push(written.try_into().map_err(|reason| ConfigError::FileWorker { path: path(), which, reason })?);
        }
        for text in &flags.workers {
            workers.push(text.parse().map_err(|reason| ConfigError::Worker { text: text.clone(), reason })?);
        }
        let discovery = file
            .discovery
            .iter()
            .chain(&flags.discovery)
            .map(|text| text.parse::<Discovery>().map_err(|reason| ConfigError::Discovery { text: text.clone(), reason }));
        let discovery = discovery.collect::<Result<Vec<_>, _>>()?;
        if let Some(twice) = discovery.iter().enumerate().find_map(|(at, it)| discovery[..at].contains(it).then_some(it)) {
            return Err(ConfigError::Discovery { text: twice.to_string(), reason: "it is there twice; name it once".to_owned() });
        }
        for text in &flags.models {
            let (name, source) = read_model(text).map_err(|reason| ConfigError::Model { text: text.clone(), reason })?;
            file.models.entry(name.to_owned()).or_default().tokenizer = Some(source);
        }
        let models = ModelNames::new(&file.models)?;
        let named = file.models.into_iter().filter_map(|(name, config)| Some((name, config.tokenizer?)));
        let tokenizers: BTreeMap<String, TokenizerSource> = named.collect();
        let routing = file.routing.resolve("routing", flags.routing, flags.routing_settings, flags.routing_on_error)?;
        let admission =
            file.admission.resolve("admission", flags.admission, flags.admission_settings, flags.admission_on_error)?;
        let mut limits = file.limits;
        limits.max_body_bytes = flags.max_body_bytes.unwrap_or(limits.max_body_bytes);
        limits.check()?;
        file.queue.check(&limits)?;
        file.slo.check()?;
        file.migration.check()?;
        file.health.check().map_err(ConfigError::Health)?;
        let (hold, most) = (file.health.hold_s, limits.request_timeout_s);
        // What was not said is no mistake: it is cut.
        if hold > most && hold != HealthConfig::default().hold_s {
            return Err(ConfigError::Health(format!(
                "health.hold_s is {hold}; use 0 to {most}, which is limits.request_timeout_s"
            )));
        }
        let state_dir = flags.state_dir.or(file.state_dir);
        let receipts = receipts(file.receipts, flags.receipts, state_dir.is_some())?;
        let config = Self {
            flags: flags_given,
            http: flags.http.or(file.http).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8080))),
            admin: flags.admin.or(file.admin).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8081))),
            admin_token: flags.admin_token.or(file.admin_token).filter(|token| !token.is_empty()),
            workers,
            discovery,
            models,
            tokenizers,
            routing,
            admission,
            state_dir,
            expose_worker: flags.expose_worker || file.expose_worker,
            log: flags.log.or(file.log).unwrap_or_default(),
            log_level: flags.log_level.or(file.log_level).unwrap_or_else(|| "info".to_owned()),
            kv: file.kv,
            health: file.health,
            limits,
            queue: file.queue,
            slo: file.slo,
            migration: file.migration,
            door: DoorConfig::resolve(
                DoorSections { auth: file.auth, cors: file.cors, tls: file.tls, admin_tls: file.admin_tls, otlp: file.otlp },
                flags.keys,
            )?,
            receipts,
        };
        if config.admin_token.is_none() && !is_loopback(config.admin.ip()) {
            return Err(ConfigError::AdminOpen { address: config.admin });
        }
        Ok(config)
    }
}

/// Whether there are receipts, and which: on where they have a place, unless somebody says otherwise.
fn receipts(written: ReceiptsConfig, flag: Option<Switch>, has_place: bool) -> Result<Option<ReceiptsConfig>, ConfigError> {
    written.check().map_err(ConfigError::Receipts)?;
    match flag.map(|switch| switch == Switch::On).or(written.enabled) {
        Some(true) if !has_place => Err(ConfigError::ReceiptsNowhere),
        is_on => Ok(is_on.unwrap_or(has_place).then_some(written)),
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

/// Whether a text is a configuration file, as far as one can tell by its keys.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn written(text: &str) -> Result<(), String> {
    toml::from_str::<File>(text).map(drop).map_err(|error| error.to_string())
}

/// Settings given as JSON or as @FILE, as a JSON text.
pub(crate) fn read_settings(origin: &str, text: &str) -> Result<String, ConfigError> {
    let text = match text.strip_prefix('@') {
        Some(path) => fs::read_to_string(path).map_err(|error| ConfigError::Settings {
            origin: origin.to_owned(),
            reason: format!("{path} cannot be read: {error}"),
        })?,
        None => text.to_owned(),
    };
    let value: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text)
        .map_err(|error| ConfigError::Settings { origin: origin.to_owned(), reason: error.to_string() })?;
    Ok(serde_json::Value::Object(value).to_string())
}

/// `NAME=DIR` or `NAME=engine`
fn read_model(text: &str) -> Result<(&str, TokenizerSource), &'static str> {
    let (name, source) = text.split_once('=').ok_or("there is no =")?;
    if name.is_empty() || source.is_empty() {
        return Err("one side of the = is empty");
    }
    Ok((name, PathBuf::from(source).into()))
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(workers: &[&str]) -> ServeFlags {
        ServeFlags { workers: workers.iter().map(|&worker| worker.to_owned()).collect(), ..ServeFlags::default() }
    }

    #[test]
    fn the_documented_file_is_one_and_shows_the_defaults() {
        let document = include_str!("../../docs/configuration.md");
        let example = document.split("```toml").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        let file: File = toml::from_str(example).unwrap();
        assert_eq!((file.limits, file.receipts, file.kv), (Limits::default(), ReceiptsConfig::default(), KvConfig::default()));
        assert_eq!((file.queue, file.slo), (QueueConfig::default(), SloConfig::default()));
        assert_eq!(file.migration, Migration::default());
        // What is shown as an alternative is one too.
        let all = example.lines().map(|line| line.strip_prefix("# ").unwrap_or(line)).collect::<Vec<_>>().join("\n");
        let file: File = toml::from_str(&all).unwrap();
        assert!(file.admin_token.is_some() && file.state_dir.is_some() && file.routing.settings.is_some());
        assert!(file.cors.is_some() && file.tls.is_some() && file.admin_tls.is_some() && file.otlp.is_some());
        assert!(file.discovery.len() == 2 && file.models.len() == 3);
        file.queue.check(&file.limits).unwrap();
        file.slo.check().unwrap();
        assert!(file.queue.classes.len() == 1 && file.queue.tenants.len() == 1 && file.slo != SloConfig::default());
        let worker = &file.worker[0];
        assert!(worker.name.is_some() && worker.labels.len() == 2 && worker.kind.is_some() && worker.ranks.is_some());
        assert!(
            worker.block_size.is_some() && worker.ca_file.is_some() && worker.bearer.is_some() && worker.bearer_file.is_some()
        );
        assert!(worker.bearer_env.is_some() && worker.model.is_some() && worker.profile.is_some());
        assert_eq!(file.receipts.enabled, Some(true));
    }

    #[test]
    fn flags_override_the_file_and_unknown_keys_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("host.toml");
        fs::write(&path, "http = '127.0.0.1:1'\nadmin='127.0.0.1:2'\n[routing]\npolicy='x.wasm'\nsettings={a=1}\n[[worker]]\nurl='http://h:1'\n").unwrap();
        let with = |more: ServeFlags| Config::resolve(ServeFlags { config: Some(path.clone()), ..more });
        let config = with(ServeFlags { http: "127.0.0.1:3".parse().ok(), ..flags(&["http://h:2"]) }).unwrap();
        assert_eq!((config.http.port(), config.admin.port(), config.workers.len()), (3, 2, 2));
        assert_eq!(config.routing.seed, Some(Seed::File { path: "x.wasm".into(), settings: "{\"a\":1}".to_owned() }));
        assert_eq!(config.routing.on_error, None);
        fs::write(&path, "[routing]\non_error = 'closed'\n[[worker]]\nurl='http://h:1'\n").unwrap();
        assert_eq!(with(flags(&[])).unwrap().routing.on_error, Some(OnError::Closed));
        let flagged = ServeFlags { routing_on_error: Some(OnError::LastGood), ..flags(&[]) };
        assert_eq!(with(flagged).unwrap().routing.on_error, Some(OnError::LastGood));
        fs::write(&path, "[limits]\nmax_body = 3\n").unwrap();
        let error = with(flags(&[])).unwrap_err().to_string();
        assert!(error.contains("max_body") && error.contains("max_body_bytes") && error.contains("line 2"), "{error}");
        fs::write(&path, "[[worker]]\nurl='http://h'\n[[worker]]\nurl='http://i'\nranks=0\n").unwrap();
        let error = with(flags(&[])).unwrap_err().to_string();
        assert!(error.contains("worker 2 of config file") && error.contains("ranks is 0"), "{error}");
    }

    #[test]
    fn tokenizers_are_of_the_file_and_of_flags_which_win() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("host.toml");
        fs::write(&path, "[models]\na='b'\nb={tokenizer='/b'}\nc={tokenizer='engine', fallbacks=['b']}\n").unwrap();
        let with = |models: &[&str]| {
            let models = models.iter().map(|&model| model.to_owned()).collect();
            Config::resolve(ServeFlags { config: Some(path.clone()), models, ..flags(&["http://h:1"]) })
        };
        let directory = |path: &str| TokenizerSource::Directory(path.into());
        let tokenizers = with(&["b=./engine", "d/e=/d=e"]).unwrap().tokenizers;
        let expected = [("b", directory("./engine")), ("c", TokenizerSource::Engine), ("d/e", directory("/d=e"))];
        assert_eq!(tokenizers, BTreeMap::from(expected.map(|(name, source)| (name.to_owned(), source))));
        assert!(with(&["b"]).unwrap_err().to_string().contains("write NAME=DIR"));
        assert!(with(&["=x"]).unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn what_a_running_host_cannot_change_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("host.toml");
        fs::write(&path, "[[worker]]\nurl='http://h:1'\n").unwrap();
        let running = Config::resolve(ServeFlags { config: Some(path.clone()), ..ServeFlags::default() }).unwrap();
        let now = "log_level='debug'\n[models]\na='b'\n[limits]\nmax_choices=3\n[[worker]]\nurl='http://h:2'\n";
        fs::write(&path, now).unwrap();
        assert!(running.again().unwrap().needs_restart(&running).is_empty());
        fs::write(&path, format!("admin='127.0.0.1:9'\nexpose_worker=true\n{now}\n").replace("max_choices", "drain_s")).unwrap();
        assert_eq!(running.again().unwrap().needs_restart(&running), ["admin", "expose_worker", "limits.drain_s"]);
    }

    #[test]
    fn receipts_are_on_where_they_have_a_place_unless_somebody_says_otherwise() {
        let off = || ReceiptsConfig { enabled: Some(false), ..ReceiptsConfig::default() };
        let is_on = |written, flag, has_place| receipts(written, flag, has_place).map(|on| on.is_some());
        assert!(matches!(is_on(ReceiptsConfig::default(), None, true), Ok(true)));
        assert!(matches!(is_on(ReceiptsConfig::default(), None, false), Ok(false)));
        assert!(matches!(is_on(off(), None, true), Ok(false)));
        assert!(matches!(is_on(off(), Some(Switch::On), true), Ok(true)));
        assert!(matches!(is_on(off(), Some(Switch::On), false), Err(ConfigError::ReceiptsNowhere)));
        let wrong = ReceiptsConfig { files: 0, ..ReceiptsConfig::default() };
        assert!(receipts(wrong, None, false).unwrap_err().to_string().contains("receipts.files is 0"));
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
        let error = refused(flags(&["mock://a,role=chef"]));
        assert!(error.contains("aggregated") && error.contains("write URL"), "{error}");
        let discovered = |text: &str| refused(ServeFlags { discovery: vec![text.to_owned(); 2], ..ServeFlags::default() });
        assert!(discovered("dns:x").contains("file:DIRECTORY") && discovered("file:/w").contains("twice"));
    }
}
