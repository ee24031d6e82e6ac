//! `dynamo-host serve`: wires the parts, prints the listeners, runs until it is told to stop.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use dynamo_host_index::{IndexLimits, PrefixIndexes};
use dynamo_host_policy::{Limits as PolicyLimits, Now, PolicyRuntime, RuntimeError};
use dynamo_host_store::StoreError;
use dynamo_host_tokens::TokenizerError;
use serde_json::json;
use tokio::net::TcpListener;

use crate::{
    admin::{self, Admin},
    admit::Queue,
    audit::{Audit, Entry, Who},
    auth::{Gate, Keys, KeysError},
    clock::{Clock, unix_ms},
    config::{Config, DoorConfig},
    cores::Cores,
    door::{self, Door},
    exposition::Exposition,
    handoff::Handoffs,
    kv,
    listener::{self, Server},
    meters::{self, RequestMeters},
    observe::Observer,
    policies::{AllWishes, Policies},
    prefixes::Prefixes,
    receipts::Receipts,
    reload::Reload,
    request::Lane,
    roster::{Roster, RosterError},
    stop::{Signals, Stopping},
    tasks, telemetry,
    tls::{ServerTls, TlsError, TlsFiles},
    tokenize::Tokenizing,
    trace::{OtlpError, Traces},
};

/// How long the first probes may delay the start.
const FIRST_PROBES: Duration = Duration::from_secs(1);

/// How long receipts that wait to be written may delay the end, and one that was asked for twice.
const LAST_RECEIPTS: Duration = Duration::from_secs(5);
const LAST_RECEIPTS_AT_ONCE: Duration = Duration::from_millis(500);

/// Why the host does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("the {what} cannot listen on {address}: {reason}; choose another address with {flag}, port 0 for any free one")]
    Listen { what: &'static str, address: SocketAddr, flag: &'static str, reason: String },
    #[error(transparent)]
    Roster(#[from] RosterError),
    #[error(transparent)]
    Sandbox(#[from] RuntimeError),
    #[error(transparent)]
    State(#[from] StoreError),
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error("tokenizer of model {model:?}: {error}")]
    Tokenizer { model: String, error: TokenizerError },
    #[error("{section} of the configuration: {error}")]
    Tls { section: &'static str, error: TlsError },
    #[error(transparent)]
    Otlp(#[from] OtlpError),
    #[error("signals to stop cannot be heard: {reason}")]
    Signals { reason: String },
    #[error("discovery {text:?}: {reason}")]
    Discovery { text: String, reason: String },
    #[error("the {what} failed: {reason}")]
    Failed { what: &'static str, reason: String },
}

/// Runs a host until a stop signal. Returns the exit code: 0, or that of a second signal that cut the stop short.
pub(crate) async fn run(config: Config) -> Result<u8, ServeError> {
    let prometheus = meters::install();
    let traces = config.door.otlp.as_ref().map(Traces::start).transpose()?.map(Arc::new);
    let log_level = telemetry::install(config.log, &config.log_level, traces.as_deref());
    let gate = gate(&config.door)?;
    let (door_tls, admin_tls) = (tls("[tls]", &config.door.tls)?, tls("[admin_tls]", &config.door.admin_tls)?);
    let clock = Clock::start();
    let tokenizing = {
        let sources = config.tokenizers.clone();
        let loaded = tokio::task::spawn_blocking(move || Tokenizing::load(&sources)).await;
        let loaded = loaded.map_err(|error| ServeError::Failed { what: "reading of tokenizers", reason: error.to_string() })?;
        loaded.map_err(|(model, error)| ServeError::Tokenizer { model, error })?
    };

    let door_listener = listen("front door", config.http, "--http").await?;
    let admin_listener = listen("admin API", config.admin, "--admin").await?;
    let indexes = PrefixIndexes::with_limits(IndexLimits { max_blocks: config.kv.max_blocks });
    let roster = Roster::new(clock, config.limits.max_workers, Arc::clone(&indexes), config.state_dir.as_deref());
    roster.set_health(config.health.clone());
    roster.configure(&config.workers, config.models.clone())?;
    let cache = config.state_dir.as_ref().map(|state| state.join("compiled"));
    let tell_time = Arc::new(move || Now { monotonic_ms: clock.now_ms(), unix_ms: unix_ms() });
    let runtime = match PolicyRuntime::new(PolicyLimits::default(), tell_time.clone(), cache.as_deref()) {
        // Policies compile more slowly without their cache; that is no reason not to serve.
        Err(error @ RuntimeError::Cache { .. }) => {
            tracing::warn!("{error}; policies are compiled anew at each start");
            PolicyRuntime::new(PolicyLimits::default(), tell_time, None)?
        }
        other => other?,
    };
    let policies = {
        let (state_dir, routing, admission) = (config.state_dir.clone(), config.routing.clone(), config.admission.clone());
        let open = move || {
            let wishes = AllWishes { routing: routing.wishes(), admission: admission.wishes() };
            Policies::open(Arc::new(runtime), state_dir.as_deref(), wishes)
        };
        let opened = tokio::task::spawn_blocking(open).await;
        Arc::new(opened.map_err(|error| ServeError::Failed { what: "policy start-up", reason: error.to_string() })??)
    };
    if config.state_dir.is_none() {
        tracing::info!("no --state-dir: policy changes do not survive a restart");
    }
    for discovery in &config.discovery {
        let failed = |reason| ServeError::Discovery { text: discovery.to_string(), reason };
        discovery.start(Arc::clone(&roster)).await.map_err(failed)?;
    }
    roster.start(FIRST_PROBES).await;

    let receipts = match (&config.receipts, &config.state_dir) {
        (Some(receipts), Some(state_dir)) => Receipts::start(receipts, state_dir, policies.routing().name()),
        _ => Receipts::off(),
    };
    let stopping = Stopping::serving();
    let queue = Queue::start(&roster, clock, &config);
    let lane = Arc::new(Lane {
        stopping: stopping.clone(),
        admission: Arc::clone(policies.admission()),
        routing: Arc::clone(policies.routing()),
        queue: Arc::clone(&queue),
        roster: Arc::clone(&roster),
        prefixes: Prefixes::new(Arc::clone(&indexes), config.kv.approximate, tokenizing),
        clock,
        limits: ArcSwap::from_pointee(config.limits.clone()),
        migration: ArcSwap::from_pointee(config.migration.clone()),
        meters: RequestMeters::new(),
        observer: Observer::start(),
        receipts: receipts.clone(),
        handoffs: Handoffs::new(),
        expose_worker: config.expose_worker,
        // Another run decides with other seeds.
        decisions: AtomicU64::new(unix_ms() << 20),
    });
    let metrics = Exposition::new(prometheus.clone(), Arc::clone(&roster));
    let (upkeep, of_roster) = (prometheus, Arc::clone(&roster));
    tasks::spawn("metrics upkeep", async move {
        loop {
            tokio::time::sleep(meters::UPKEEP).await;
            kv::measure_index(&indexes.stats());
            metrics::gauge!("dynamo_host_kv_index_stale_workers").set(of_roster.stale_workers() as f64);
            upkeep.run_upkeep();
        }
    });
    let audit = Audit::open(config.state_dir.as_deref());
    let reload = Reload::new(config.clone(), Arc::clone(&roster), Arc::clone(&lane), audit.clone(), log_level);
    let admin = Admin {
        policies: Arc::clone(&policies),
        roster,
        metrics: metrics.clone(),
        audit: audit.clone(),
        queue,
        config: reload.status(),
        started: Instant::now(),
        token: config.admin_token.as_deref().map(Arc::from),
    };

    reload.start();
    let mut signals = Signals::hear().map_err(|error| ServeError::Signals { reason: error.to_string() })?;
    audit.append(Entry { to: admin::standings(&policies), ..Entry::new("start", Who::Host, None) }).await;
    tasks::spawn("audit of quarantines", admin::audit_quarantines(audit.clone(), policies));
    announce("front door", &door_listener, door_tls.is_some());
    announce("admin", &admin_listener, admin_tls.is_some());
    let limits = &config.limits;
    let door = door::router(Door { lane, gate, metrics, traces: traces.clone() }, config.door.cors.as_ref());
    let cores =
        Cores::start().map_err(|error| ServeError::Failed { what: "start of a thread per core", reason: error.to_string() })?;
    let door = Server { what: "front door", listener: door_listener, router: door, tls: door_tls, cores, names_peers: false };
    let admin = Server {
        what: "admin API",
        listener: admin_listener,
        router: admin::router(admin),
        tls: admin_tls,
        cores: Cores::here(),
        names_peers: true,
    };
    let door = listener::serve(door, limits, stopping.clone());
    let admin = listener::serve(admin, limits, stopping.clone());
    let servers = async { tokio::join!(door, admin) };
    tokio::pin!(servers);
    let signal = tokio::select! {
        _ = &mut servers => unreachable!("listeners end only when they are told to"),
        signal = signals.next() => signal,
    };
    let (delay, grace) = (Duration::from_secs(limits.stop_delay_s), Duration::from_secs(limits.drain_s));
    tracing::info!("stopping on {}: no new requests in {delay:?}, running ones have {grace:?} then", signal.name());
    let entry = Entry { to: json!(signal.name()), ..Entry::new("stop", Who::System("signal"), None) };
    let noted = tokio::task::spawn_blocking(move || audit.append_blocking(&entry));
    let mut second = None;
    let last_words = async {
        let last_words;
        (last_words, second) = stopping.wind_down(delay, grace, &mut signals).await;
        tokio::select! {
            () = tokio::time::sleep(last_words) => {}
            again = signals.next() => second = second.or(Some(again)),
        }
    };
    tokio::select! {
        _ = &mut servers => {}
        () = last_words => {}
    }
    let patience = if second.is_some() { LAST_RECEIPTS_AT_ONCE } else { LAST_RECEIPTS };
    let (_, ()) = tokio::join!(tokio::time::timeout(patience, noted), receipts.flush(patience));
    if let Some(signal) = second {
        tracing::warn!("stopped at once, on a second signal");
        return Ok(signal.exit_code());
    }
    if let Some(traces) = traces {
        traces.stop().await;
    }
    Ok(0)
}

/// How requests are let in; keys are read again when they change.
fn gate(config: &DoorConfig) -> Result<Gate, KeysError> {
    let keys = config.keys_file.as_deref().map(Keys::load).transpose()?.map(Arc::new);
    keys.iter().for_each(Keys::watch);
    Ok(Gate { keys, tenant_header: config.tenant_header.clone() })
}

/// A listener's certificates, read again when they change.
fn tls(section: &'static str, files: &Option<TlsFiles>) -> Result<Option<Arc<ServerTls>>, ServeError> {
    let tls = files.clone().map(ServerTls::load).transpose();
    let tls = tls.map_err(|error| ServeError::Tls { section, error })?.map(Arc::new);
    tls.iter().for_each(ServerTls::watch);
    Ok(tls)
}

/// Binds an address.
pub(crate) async fn listen(what: &'static str, address: SocketAddr, flag: &'static str) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|error| {
        let reason = match error.kind() {
            io::ErrorKind::AddrInUse => "the port is in use".to_owned(),
            io::ErrorKind::PermissionDenied => "this user may not".to_owned(),
            _ => error.to_string(),
        };
        ServeError::Listen { what, address, flag, reason }
    })
}

/// Tells people and scripts where a listener is: one line that ends in its URL.
#[expect(clippy::print_stdout, reason = "the listeners' lines are what stdout is for")]
pub(crate) fn announce(what: &str, listener: &TcpListener, is_tls: bool) {
    if let Ok(address) = listener.local_addr() {
        let scheme = if is_tls { "https" } else { "http" };
        println!("{what} listening on {scheme}://{address}");
    }
}

/// Resolves at SIGINT or SIGTERM.
pub(crate) async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        }
        Err(_) => drop(tokio::signal::ctrl_c().await),
    }
}
