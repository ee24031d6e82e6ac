//! A routing policy that misbehaves in a way of choice, at requests of choice.
//!
//! It decides well until a request asks for exactly `at_max_output_tokens` tokens: so it passes its probe, as a policy
//! that fails in production would have.

use std::{hint::black_box, time::Duration};

use dynamo_policy_sdk::{
    Candidates, Decision, Request, Router, rank,
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
    state, telemetry,
};

/// Which misbehaviour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(crate = "serde", rename_all = "kebab-case")]
#[schemars(crate = "schemars")]
pub enum Mode {
    /// None.
    #[default]
    Good,
    /// A panic.
    Trap,
    /// An endless loop.
    Loop,
    /// Memory without end.
    Memory,
    /// Recursion without end.
    Recursion,
    /// Bulk memory writes: few instructions, much work.
    Bulk,
    /// Endless calls of the host.
    HostCalls,
    /// A row that does not exist.
    OutOfRange,
    /// A row twice.
    Duplicate,
    /// No rows.
    Empty,
    /// More rows than allowed.
    TooMany,
    /// No answer.
    NoAnswer,
    /// A rejection with status 200.
    BadStatus,
    /// A rejection.
    Reject,
    /// A rejection that tells whose request it is.
    Gossip,
    /// Never anything but hold.
    Hold,
    /// A flood of log lines and metrics.
    Flood,
    /// A panic while the settings are read.
    TrapInConfigure,
    /// A panic at every request, the probe's too.
    TrapAlways,
}

/// What an operator can set.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// The misbehaviour.
    pub mode: Mode,
    /// The requests that it happens at.
    pub at_max_output_tokens: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { mode: Mode::Good, at_max_output_tokens: 13 }
    }
}

/// The policy.
pub struct Hostile(Settings);

impl Router for Hostile {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        assert!(settings.mode != Mode::TrapInConfigure, "configured to panic in configure");
        Ok(Self(settings))
    }

    fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
        let due = request.max_output_tokens() == self.0.at_max_output_tokens || self.0.mode == Mode::TrapAlways;
        match self.0.mode {
            Mode::Gossip if due => gossip(request),
            mode if due => misbehave(mode, candidates),
            _ => good(candidates),
        }
    }
}

fn good(candidates: &Candidates) -> Decision {
    rank::lowest(candidates.active_requests().iter().map(|&requests| requests as f32))
}

fn gossip(request: &Request) -> Decision {
    let tenant = request.tenant().unwrap_or("nobody");
    let reason = format!("{tenant} asks {} with priority {}", request.endpoint(), request.priority());
    Decision::Reject { status: 403, retry_after: None, reason }
}

fn misbehave(mode: Mode, candidates: &Candidates) -> Decision {
    match mode {
        Mode::Good | Mode::Gossip | Mode::TrapInConfigure => {}
        Mode::Trap | Mode::TrapAlways => panic!("configured to panic"),
        Mode::Loop => loop {
            black_box(());
        },
        Mode::Memory => {
            let mut hoard = Vec::new();
            loop {
                hoard.push(black_box(Vec::<u8>::with_capacity(1 << 20)));
            }
        }
        Mode::Recursion => drop(black_box(dive(1))),
        Mode::Bulk => {
            let mut block = vec![0u8; 8 << 20];
            for byte in 0.. {
                block.fill(byte);
                black_box(&block);
            }
        }
        Mode::HostCalls => loop {
            black_box(state::get("k"));
        },
        Mode::OutOfRange => return Decision::Place(vec![candidates.count()]),
        Mode::Duplicate => return Decision::Place(vec![0, 0]),
        Mode::Empty => return Decision::Place(Vec::new()),
        Mode::TooMany => return Decision::Place((0..100_000).collect()),
        Mode::NoAnswer => return Decision::Abstain,
        Mode::BadStatus => return Decision::Reject { status: 200, retry_after: None, reason: "fine".to_owned() },
        Mode::Reject => {
            let retry_after = Some(Duration::from_millis(1500));
            return Decision::Reject { status: 429, retry_after, reason: "configured to reject".to_owned() };
        }
        Mode::Hold => return Decision::Hold(Duration::from_millis(1)),
        Mode::Flood => {
            for i in 0..100 {
                telemetry::log(telemetry::Level::Info, &"x".repeat(1 << 10));
                telemetry::counter_add(&format!("flood_{i}"), 1);
            }
        }
    }
    good(candidates)
}

#[expect(unconditional_recursion, reason = "that is the misbehaviour")]
fn dive(depth: u64) -> u64 {
    // Small frames: the stack that the host bounds runs out before the guest's own in linear memory.
    black_box(dive(depth + 1)) + depth
}

dynamo_policy_sdk::register!(Hostile);
