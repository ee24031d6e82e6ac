//! Engines: mock engines in processes of their own that die and come back, and a host over them.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::net::TcpStream;

use crate::harness::{
    client::Client,
    host::{Host, MockProcess},
};

/// 20 ms a token, alone or among others.
pub(crate) const STEADY: [&str; 2] = ["decode_ms_base=20", "decode_ms_per_sequence=0"];

/// Some engines of model `m`, by the names `e0`, `e1`, …
pub(crate) struct Engines {
    /// None while one is dead.
    engines: Vec<Option<MockProcess>>,
    addresses: Vec<String>,
    profiles: Vec<Vec<String>>,
    roles: Vec<&'static str>,
}

impl Engines {
    pub(crate) async fn start(count: usize, profile: &[&str]) -> Self {
        Self::of_roles(&vec!["aggregated"; count], profile).await
    }

    /// One of each role.
    pub(crate) async fn of_roles(roles: &[&'static str], profile: &[&str]) -> Self {
        let (mut engines, mut profiles) = (Vec::new(), Vec::new());
        for role in roles {
            let role = format!("role={role}");
            let profile: Vec<_> = profile.iter().copied().chain([role.as_str()]).collect();
            engines.push(Some(MockProcess::start(&profile).await));
            profiles.push(profile.iter().map(|&parameter| parameter.to_owned()).collect());
        }
        let address = |engine: &Option<MockProcess>| engine.as_ref().unwrap().url().strip_prefix("http://").unwrap().to_owned();
        let addresses = engines.iter().map(address).collect();
        Self { engines, addresses, profiles, roles: roles.to_vec() }
    }

    pub(crate) fn count(&self) -> usize {
        self.engines.len()
    }

    /// A host over them that tells which of them served; with more of a configuration file.
    pub(crate) async fn host(&self, more: &str) -> Host {
        Host::configured(more, &self.arguments().iter().map(String::as_str).collect::<Vec<_>>()).await
    }

    /// What tells a host of them.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let worker = |(at, address): (usize, &String)| format!("http://{address},name=e{at},model=m,role={}", self.roles[at]);
        let workers = self.addresses.iter().enumerate().map(worker);
        ["--expose-worker".to_owned()].into_iter().chain(workers.flat_map(|worker| ["--worker".to_owned(), worker])).collect()
    }

    /// The engine's own HTTP.
    pub(crate) fn http(&self, at: usize) -> &Client {
        &self.engines[at].as_ref().unwrap().http
    }

    /// Sets what one does wrong from now on.
    pub(crate) async fn faults(&self, at: usize, faults: Value) {
        self.http(at).ask("/mock/faults", &faults).await;
    }

    /// How many requests its faults struck.
    pub(crate) async fn struck(&self, at: usize) -> u64 {
        self.http(at).get_json("/mock/faults").await["struck"].as_u64().unwrap()
    }

    pub(crate) fn is_alive(&self, at: usize) -> bool {
        self.engines[at].is_some()
    }

    /// Whether nobody listens where it was.
    pub(crate) async fn is_gone(&self, at: usize) -> bool {
        TcpStream::connect(&self.addresses[at]).await.is_err()
    }

    /// As the system kills: at once.
    pub(crate) fn kill(&mut self, at: usize) {
        if let Some(mut engine) = self.engines[at].take() {
            engine.process.kill();
        }
    }

    /// Starts it again where it was.
    pub(crate) async fn restart(&mut self, at: usize) {
        let profile: Vec<_> = self.profiles[at].iter().map(String::as_str).collect();
        self.engines[at] = Some(MockProcess::start_at(&self.addresses[at], &profile).await);
    }

    /// It computes no more and answers nothing, while its connections stay open.
    pub(crate) fn freeze(&self, at: usize) {
        self.signal(at, Signal::STOP);
    }

    pub(crate) fn thaw(&self, at: usize) {
        self.signal(at, Signal::CONT);
    }

    /// It is told to stop.
    pub(crate) fn terminate(&self, at: usize) {
        self.signal(at, Signal::TERM);
    }

    fn signal(&self, at: usize, signal: Signal) {
        if let Some(engine) = &self.engines[at] {
            let pid = Pid::from_raw(engine.process.id().try_into().unwrap()).unwrap();
            kill_process(pid, signal).unwrap();
        }
    }
}

/// The same numbers from the same seed.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    /// A number below `sides`.
    pub(crate) fn below(&mut self, sides: usize) -> usize {
        // Splitmix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ (mixed >> 31)) % sides as u64) as usize
    }

    /// A time between two others.
    pub(crate) fn between(&mut self, least_ms: u64, most_ms: u64) -> Duration {
        Duration::from_millis(least_ms + self.below((most_ms - least_ms + 1) as usize) as u64)
    }
}
