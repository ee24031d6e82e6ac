//! What can be typed after `simulate`, and what it means.

use std::{fs, path::PathBuf, time::Duration};

use dynamo_engine_mock::{MockOptions, Profile};
use dynamo_host_core::{Role, SlotKind, SlotName};
use dynamo_host_policy::{Limits, read_component};
use dynamo_host_sim::{AdmissionPolicy, Contender, EngineSpec, Faults, Links, Queueing, Tenant, default_profile};

use crate::{
    cli::{Output, policy::file_and_settings},
    config::read_settings,
};

/// What a policy for that slot begins with.
const ADMISSION: &str = "admission=";

/// Policies side by side over a trace, in virtual time.
#[derive(clap::Args)]
pub(crate) struct SimulateFlags {
    /// What comes: a Mooncake JSONL or an Azure CSV file, or synthetic:requests=N,rate=R,…
    #[arg(long, value_name = "FILE|synthetic:KEY=VALUE,…")]
    pub(super) trace: String,
    /// How many workers there are, with their role (role=prefill, decode, both or aggregated) and properties of their engines
    /// such as kv_blocks=4096 [default: 8]; may be repeated for a mixed fleet
    #[arg(long, value_name = "N[,KEY=VALUE…]")]
    workers: Vec<String>,
    /// What decides: a component, with its settings as JSON or @FILE, or native; may be repeated: all for routing stand side by
    /// side, one for admission is before the queue of each [default: routing=native]
    #[arg(long = "policy", value_name = "SLOT=FILE.wasm[,JSON|,@FILE]")]
    policies: Vec<String>,
    /// Requests come this many times as fast as in the trace
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub(super) speed: f64,
    /// What engines hold and how fast they are, as `dynamo-host profile` writes it [default: the built-in profile]
    #[arg(long, value_name = "FILE.json")]
    engine_profile: Option<PathBuf>,
    /// Tokens of a KV block, of all engines
    #[arg(long, value_name = "TOKENS")]
    block_size: Option<u32>,
    /// KV blocks of each engine
    #[arg(long, value_name = "N")]
    kv_blocks: Option<u32>,
    /// How fast KV goes from one engine to another, through the port that each has for each direction
    #[arg(long, value_name = "GB/S", default_value_t = 64.0)]
    link_bandwidth: f64,
    /// What a transfer of KV takes before its first byte comes
    #[arg(long, value_name = "MS", default_value_t = 1.0)]
    link_latency_ms: f64,
    /// A queue in front of the engines, as the host has it: bounds, how long a request waits, how many run at once, how many
    /// clients leave: max_requests, max_tokens, max_running, prefill_tokens, timeout_s, leave (a share), leave_s
    #[arg(long, value_name = "KEY=VALUE,…", num_args = 0..=1, default_missing_value = "")]
    queue: Option<String>,
    /// Whose requests come, and how they are let in: weight, class, class_weight, tier, priority, share; may be repeated:
    /// sessions are dealt out by share. Needs --queue
    #[arg(long = "tenant", value_name = "NAME[,KEY=VALUE…]", requires = "queue")]
    tenants: Vec<String>,
    /// Engines that fail, such as die_every_s=60,down_s=5: die_every_s, down_s, slow_every_s, slow_s, slow_factor,
    /// hang_every_s, hang_s, stall_s, attempts
    #[arg(long, value_name = "KEY=VALUE,…")]
    faults: Option<String>,
    /// Check all books after every so many events, and their sums after each
    #[arg(long, value_name = "EVENTS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) audit_every: Option<u64>,
    /// Only the first so many requests of the trace
    #[arg(long, value_name = "N")]
    pub(super) limit: Option<usize>,
    /// Seed of all that is left to chance: the same one gives the same report
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) seed: u64,
    /// How often the load of each engine is read
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) load_interval_ms: u64,
    /// How late the index hears of what an engine has cached
    #[arg(long, value_name = "MS", default_value_t = 5)]
    pub(super) kv_event_lag_ms: u64,
    /// Policies that are simulated at once [default: one per core]
    #[arg(long, value_name = "N")]
    pub(super) threads: Option<usize>,
    /// Write the report as a page with plots, which needs nothing else to be seen
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
    /// Write the report as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// How to print the report
    #[arg(long, default_value = "text")]
    pub(super) output: Output,
}

impl SimulateFlags {
    /// The engines, one for each worker.
    pub(super) fn workers(&self) -> Result<Vec<EngineSpec>, String> {
        let base = self.profile()?;
        let groups = if self.workers.is_empty() { vec!["8".to_owned()] } else { self.workers.clone() };
        let mut workers = Vec::new();
        for group in &groups {
            let mut parts = group.split(',');
            let count = parts.next().and_then(|count| count.parse::<usize>().ok()).filter(|count| (1..=100_000).contains(count));
            let count =
                count.ok_or_else(|| format!("--workers {group}: begin with a number of 1 to 100000, as in 8,kv_blocks=4096"))?;
            let mut options = MockOptions { profile: base.clone(), ..MockOptions::default() };
            let mut role = Role::Aggregated;
            for part in parts {
                let (key, value) = part.split_once('=').ok_or_else(|| format!("--workers {group}: {part:?} is not KEY=VALUE"))?;
                if key == "role" {
                    role = value.parse().map_err(|error| format!("--workers {group}: {error}"))?;
                    continue;
                }
                options.set(key, value).map_err(|error| format!("--workers {group}: {error}"))?;
            }
            options.profile.validate().map_err(|error| format!("--workers {group}: {error}"))?;
            workers.extend(std::iter::repeat_n(EngineSpec { role, profile: options.profile }, count));
        }
        Ok(workers)
    }

    /// The ways by which KV goes from one to another.
    pub(super) fn links(&self) -> Result<Links, String> {
        let (bandwidth, latency_ms) = (self.link_bandwidth, self.link_latency_ms);
        // Up to a petabyte a second, and to a minute.
        if !(1e-9..=1e6).contains(&bandwidth) {
            return Err(format!("--link-bandwidth {bandwidth}: use GB a second, from 0.000000001 to 1000000"));
        }
        if !(0.0..=60_000.0).contains(&latency_ms) {
            return Err(format!("--link-latency-ms {latency_ms}: use milliseconds, from 0 to 60000"));
        }
        Ok(Links { bytes_per_second: bandwidth * 1e9, latency: Duration::from_secs_f64(latency_ms / 1000.0) })
    }

    /// The queue and who comes to it, if there is to be one.
    pub(super) fn queueing(&self) -> Result<Option<Queueing>, String> {
        let admission: Vec<&String> = self.policies.iter().filter(|given| given.starts_with(ADMISSION)).collect();
        let Some(text) = &self.queue else {
            return match admission.first() {
                Some(given) => Err(format!("--policy {given}: admission is before a queue; add --queue")),
                None => Ok(None),
            };
        };
        let mut queueing = Queueing::parse(text).map_err(|error| format!("--queue {text}: {error}"))?;
        let tenants: Vec<Tenant> = self
            .tenants
            .iter()
            .map(|text| Tenant::parse(text).map_err(|error| format!("--tenant {text}: {error}")))
            .collect::<Result<_, _>>()?;
        if let Some(twice) = (1..tenants.len()).find(|&at| tenants[..at].iter().any(|other| other.name == tenants[at].name)) {
            return Err(format!("--tenant {}: it is there already; give each tenant once", tenants[twice].name));
        }
        if !tenants.is_empty() {
            if tenants.iter().all(|tenant| tenant.share == 0.0) {
                return Err("--tenant: all shares are 0; give one of them share=1".to_owned());
            }
            queueing.tenants = tenants;
        }
        if let [_, second, ..] = admission[..] {
            return Err(format!(
                "--policy {second}: there is another one for admission already; simulate them one after the other"
            ));
        }
        if let Some(Contender { name, policy: Some((bytes, settings)) }) =
            admission.first().map(|given| contender(given)).transpose()?
        {
            queueing.admission = Some(AdmissionPolicy { name, bytes, settings });
        }
        Ok(Some(queueing))
    }

    /// How engines fail, if they do.
    pub(super) fn faults(&self) -> Result<Option<Faults>, String> {
        let parse = |text: &String| Faults::parse(text).map_err(|error| format!("--faults {text}: {error}"));
        self.faults.as_ref().map(parse).transpose()
    }

    fn profile(&self) -> Result<Profile, String> {
        let mut profile = match &self.engine_profile {
            None => default_profile(),
            Some(path) => {
                let text = fs::read_to_string(path)
                    .map_err(|error| format!("--engine-profile {} cannot be read: {error}", path.display()))?;
                serde_json::from_str(&text).map_err(|error| {
                    format!("--engine-profile {}: {error}; write one with: dynamo-host profile URL", path.display())
                })?
            }
        };
        profile.block_size = self.block_size.unwrap_or(profile.block_size);
        profile.kv_blocks = self.kv_blocks.unwrap_or(profile.kv_blocks);
        Ok(profile)
    }

    /// What decides, each with a name of its own.
    pub(super) fn contenders(&self) -> Result<Vec<Contender>, String> {
        let given = if self.policies.is_empty() { vec!["routing=native".to_owned()] } else { self.policies.clone() };
        let is_routing = |given: &&String| !given.starts_with(ADMISSION);
        let mut contenders: Vec<Contender> =
            given.iter().filter(is_routing).map(|given| contender(given)).collect::<Result<_, _>>()?;
        if contenders.is_empty() {
            contenders.push(contender("routing=native")?);
        }
        for at in 1..contenders.len() {
            let (before, here) = contenders.split_at_mut(at);
            let count = before.iter().filter(|other| other.name == here[0].name).count();
            if count > 0 {
                here[0].name = format!("{} #{}", here[0].name, count + 1);
            }
        }
        Ok(contenders)
    }
}

/// Reads `SLOT=FILE.wasm[,JSON|,@FILE]`.
fn contender(given: &str) -> Result<Contender, String> {
    const USE: &str =
        "use routing=native or routing=FILE.wasm, with settings routing=FILE.wasm,{\"key\": 1} or routing=FILE.wasm,@FILE";
    let (slot, rest) = given.split_once('=').ok_or_else(|| format!("--policy {given}: {USE}"))?;
    let slot: SlotName = slot.parse().map_err(|error| format!("--policy {given}: {error}"))?;
    if slot.kind == SlotKind::Autoscaling {
        return Err(format!("--policy {given}: only the slots routing and admission are simulated yet; {USE}"));
    }
    if rest == "native" {
        return Ok(Contender { name: "native".to_owned(), policy: None });
    }
    let (file, settings) = file_and_settings(rest);
    let path = PathBuf::from(file);
    let bytes = read_component(&path, Limits::default().component_bytes).map_err(|error| format!("--policy {file}: {error}"))?;
    let settings = settings
        .map_or_else(|| Ok("{}".to_owned()), |settings| read_settings("--policy", settings).map_err(|error| error.to_string()))?;
    let stem = path.file_stem().map_or_else(|| file.to_owned(), |stem| stem.to_string_lossy().into_owned());
    let name = if settings == "{}" { stem } else { format!("{stem} {settings}") };
    Ok(Contender { name, policy: Some((bytes, settings)) })
}
