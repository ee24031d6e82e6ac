//! A batch of events on the wire: MessagePack, as engines of every age write it.
//!
//! A batch is `[timestamp, [event…], rank?]`. An event is a map with its `type`, or, from older engines, an array with its
//! type first and its fields by place; fields at the end may be left out. Sources: vLLM `distributed/kv_events.py` from
//! 0.9 to 0.33, SGLang `disaggregation/kv_events.py`.
//!
//! Contract: pure. What is not understood, and what no prompt could be matched with, is left out by its cause ([`Cause`]);
//! the rest of the batch counts. Leaving a block out costs hits, never a wrong hit: what builds upon it has no parent then. A
//! removal that cannot be read would: the batch says so ([`Batch::must_reset`]).

mod decode;
mod encode;

use std::collections::BTreeMap;

use dynamo_engine_api::KvEvent;

pub use self::decode::Decoder;
pub use self::encode::encode;

/// Events that were published together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// When, in seconds since 1970 by the engine's clock.
    pub timestamp: f64,
    /// The data-parallel rank, if it is said.
    pub rank: Option<u32>,
    /// What is understood, in order.
    pub events: Vec<KvEvent>,
    /// What is not, or is not for prompts: how many events by cause.
    pub left_out: BTreeMap<Cause, u32>,
    /// Whether what is left out may be a removal: nothing that was told before is known to be so any more.
    pub must_reset: bool,
}

/// Why an event is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// A type that is not known.
    UnknownType,
    /// Fields that are not what they should be.
    Malformed,
    /// Not as many tokens as its blocks have.
    TokenCount,
    /// Tokens in pairs, as EAGLE's drafts hash them: no prompt's tokens are.
    Bigram,
    /// Of a layer group that does not keep whole prefixes, such as a sliding window.
    Attention,
    /// Not in the publisher's own reach.
    Locality,
    /// In a place that is not known.
    Medium,
    /// Of an adapter whose name is not said.
    Adapter,
    /// Blocks whose content is not told by tokens alone: images, embeddings.
    Multimodal,
}

impl Cause {
    /// Metric label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::UnknownType => "unknown_type",
            Self::Malformed => "malformed",
            Self::TokenCount => "token_count",
            Self::Bigram => "bigram",
            Self::Attention => "attention",
            Self::Locality => "locality",
            Self::Medium => "medium",
            Self::Adapter => "adapter",
            Self::Multimodal => "multimodal",
        }
    }
}

/// A payload that is no batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not MessagePack.
    #[error("a batch of KV events is not MessagePack: {0}")]
    MessagePack(String),
    /// Not `[timestamp, [event…], rank]`.
    #[error("a batch of KV events is {0}, not an array of a timestamp, events and a rank")]
    Shape(&'static str),
}

#[cfg(test)]
mod tests;
