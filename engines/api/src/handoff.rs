//! Hand-off: one engine computes a prompt's KV, another goes on from it.
//!
//! Contract: a request has one of three [`Leg`]s. Engines are told of each other by a [`Ticket`], which is opaque to the host: in
//! *sequential* protocols the prefill engine's answer holds it, and it goes verbatim to whoever decodes; in *concurrent* ones it
//! is made beforehand, and both are asked at once. A ticket is used once: whoever fetched with it may have freed what it is about.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use serde_json::value::RawValue;

/// How long a prefill engine keeps KV that nobody fetches, where it does not say (vLLM's `kv_lease_duration`).
pub const LEASE: Duration = Duration::from_secs(30);

/// How engines hand KV to each other. Both must do it in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// vLLM's NixlConnector: sequential, `kv_transfer_params`.
    Nixl,
    /// vLLM's MooncakeConnector: concurrent, `kv_transfer_params` with a `transfer_id`.
    Mooncake,
    /// SGLang: concurrent, `bootstrap_host`, `bootstrap_port`, `bootstrap_room`.
    Bootstrap,
    /// TensorRT-LLM: sequential, `disaggregated_params`.
    Context,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Nixl, Self::Mooncake, Self::Bootstrap, Self::Context];

    /// Its name in configuration, logs and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nixl => "nixl",
            Self::Mooncake => "mooncake",
            Self::Bootstrap => "bootstrap",
            Self::Context => "context",
        }
    }

    /// Whether both engines are asked at once.
    #[must_use]
    pub fn is_concurrent(self) -> bool {
        matches!(self, Self::Mooncake | Self::Bootstrap)
    }

    /// Whether engines of split pools serve whole requests, too.
    #[must_use]
    pub fn serves_whole(self) -> bool {
        self != Self::Bootstrap
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|protocol| protocol.name() == name);
        known.ok_or_else(|| format!("hand-off {name:?} is not known; use nixl, mooncake, bootstrap or context"))
    }
}

/// Which part of a request an engine is asked for.
#[derive(Clone, Debug, Default)]
pub enum Leg {
    /// All of it.
    #[default]
    Whole,
    /// The prompt's KV, to be kept for whoever decodes. With the ticket that both are told, where the protocol is concurrent.
    Prefill(Option<Ticket>),
    /// The output, from KV that another engine computes or has computed.
    Decode(Ticket),
}

/// What an engine that decodes is told of the one that prefills. The host looks at none of its state.
#[derive(Clone, Debug)]
pub struct Ticket {
    /// The protocol that it is of.
    pub protocol: Protocol,
    /// What the protocol says of it, as the prefill engine said it.
    pub state: Arc<RawValue>,
    /// The prompt's tokens as the prefill engine saw them, where it says.
    pub prompt_ids: Option<Arc<[u32]>>,
    /// Prompt tokens that the prefill engine had cached, where it says.
    pub cached_tokens: Option<u32>,
    /// Bytes of KV, where it says.
    pub bytes: Option<u64>,
}

/// What came of a prefill leg.
#[derive(Debug)]
pub enum Prefilled {
    /// The KV is there, and kept for a while.
    Ready(Ticket),
    /// There is nothing to decode: its answer is all of it.
    Final,
}
