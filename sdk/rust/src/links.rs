//! The ways by which KV goes from one candidate to another, as columns.

use crate::{Candidates, bindings::router::dynamo::policy::links as host};

/// What is known of the ways by which KV goes from a worker that prefills to one that decodes. Since contract 0.1.3.
///
/// A policy that reads any of this tells roles apart: in the stage [`WHOLE`](crate::stage::WHOLE) it is shown workers of all
/// [roles](crate::role), as long as the request's KV may be handed over. What it does with a request then follows from where it
/// places it: on a worker that is [`AGGREGATED`](crate::role::AGGREGATED) or [`BOTH`](crate::role::BOTH), all of it happens there; on
/// one that is [`DECODE`](crate::role::DECODE), too, which prefills for itself; on one that is
/// [`PREFILL`](crate::role::PREFILL), the prompt is computed there, and it is asked again, in the stage
/// [`DECODE`](crate::stage::DECODE), who goes on. With
/// [`PlaceDisaggregated`](crate::Decision::PlaceDisaggregated) it says both at once.
///
/// A policy that reads none of it is asked where a request shall begin, and then who goes on.
///
/// Columns are over the same rows as those of [`Candidates`]. `from` is the row of the worker that would prefill; in the stage
/// [`DECODE`](crate::stage::DECODE), `None` is the one that does or did. Each is asked of the host at each call: keep it.
#[derive(Clone, Copy, Debug)]
pub struct Links<'a> {
    candidates: &'a Candidates,
}

impl Candidates {
    /// What is known of the ways between them.
    #[must_use]
    pub fn links(&self) -> Links<'_> {
        Links { candidates: self }
    }
}

impl Links<'_> {
    /// The worker that prefills or has prefilled, in the stage [`DECODE`](crate::stage::DECODE).
    #[must_use]
    pub fn prefilled_by(self) -> Option<u64> {
        if cfg!(target_arch = "wasm32") { host::prefilled_by() } else { self.candidates.given_links.prefilled_by }
    }

    /// Whether KV can go there: 1 yes, 0 no. It cannot between engines that do it in different ways or differ in block size,
    /// from a worker to itself, and for a while where it failed several times in a row.
    #[must_use]
    pub fn reachable(self, from: impl Into<Option<u32>>) -> Vec<u32> {
        let (from, given) = (from.into(), &self.candidates.given_links);
        if cfg!(target_arch = "wasm32") { host::reachable(from) } else { given.reachable(self.candidates, from) }
    }

    /// Recent tokens of prompt per second whose KV came over, by the time from asking the decode worker to its first token.
    /// Unknown: none did.
    #[must_use]
    pub fn tokens_per_second(self, from: impl Into<Option<u32>>) -> Vec<f32> {
        let (from, given) = (from.into(), &self.candidates.given_links.tokens_per_second);
        if cfg!(target_arch = "wasm32") { host::tokens_per_second(from) } else { given.column(self.candidates, from) }
    }

    /// That time, recently, in milliseconds.
    #[must_use]
    pub fn handoff_ms(self, from: impl Into<Option<u32>>) -> Vec<f32> {
        let (from, given) = (from.into(), &self.candidates.given_links.handoff_ms);
        if cfg!(target_arch = "wasm32") { host::handoff_ms(from) } else { given.column(self.candidates, from) }
    }

    /// Share of recent hand-offs that failed, 0 to 1; unknown where there was none.
    #[must_use]
    pub fn error_rate(self, from: impl Into<Option<u32>>) -> Vec<f32> {
        let (from, given) = (from.into(), &self.candidates.given_links.error_rate);
        if cfg!(target_arch = "wasm32") { host::error_rate(from) } else { given.column(self.candidates, from) }
    }
}
