//! Links for people and tools: which ways KV has gone between workers, how fast, and which are left alone since they keep failing.

use std::collections::{HashMap, HashSet};

use dynamo_host_core::links::Link;
use serde::Serialize;

use super::{Roster, Snapshot, lock};

/// One way that KV has gone.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LinkReport {
    /// The worker that prefilled, and its rank.
    pub(crate) from: String,
    pub(crate) from_rank: u32,
    /// The one that decoded.
    pub(crate) to: String,
    pub(crate) to_rank: u32,
    /// As seen lately; `None`: nothing has arrived.
    pub(crate) tokens_per_second: Option<f32>,
    pub(crate) handoff_ms: Option<f32>,
    /// Recent share that failed, 0 to 1.
    pub(crate) error_rate: f32,
    /// For how long it is left alone yet; `None`: it is not.
    pub(crate) avoided_ms: Option<u64>,
}

impl Roster {
    /// The links that were used, between workers that are there.
    pub(crate) fn report_links(&self) -> Vec<LinkReport> {
        let snapshot = self.snapshot();
        let names = names(&snapshot);
        let now_ms = self.clock.now_ms();
        let known = |value: f32| Some(value).filter(|value| value.is_finite());
        let of = |(from, to, link): (u32, u32, Link)| {
            let ((from, from_rank), (to, to_rank)) = (*names.get(&from)?, *names.get(&to)?);
            Some(LinkReport {
                from: from.to_owned(),
                from_rank,
                to: to.to_owned(),
                to_rank,
                tokens_per_second: known(link.tokens_per_second()),
                handoff_ms: known(link.handoff_ms()),
                error_rate: link.error_rate(),
                avoided_ms: link.avoided_ms(now_ms),
            })
        };
        let mut links: Vec<LinkReport> = self.links.all().into_iter().filter_map(of).collect();
        links.sort_by(|a, b| (&a.from, a.from_rank, &a.to, a.to_rank).cmp(&(&b.from, b.from_rank, &b.to, b.to_rank)));
        links
    }

    /// Says which links have come to be avoided, and which are tried again.
    pub(super) fn show_links(&self, snapshot: &Snapshot) {
        let now_ms = self.clock.now_ms();
        let mut shown = lock(&self.avoided);
        let avoided: HashSet<(u32, u32)> = self.links.avoided(now_ms).into_iter().collect();
        if avoided == *shown {
            return;
        }
        metrics::gauge!("dynamo_host_links_avoided").set(avoided.len() as f64);
        let names = names(snapshot);
        let name = |slot: &u32| names.get(slot).map_or("a worker that is gone", |(name, _)| *name);
        for (from, to) in avoided.difference(&shown) {
            let ms = self.links.get(*from, *to).and_then(|link| link.avoided_ms(now_ms)).unwrap_or_default();
            metrics::counter!("dynamo_host_links_avoided_total").increment(1);
            tracing::warn!(
                prefill = name(from),
                decode = name(to),
                ms,
                "hand-offs keep failing this way, it is left alone for a while"
            );
        }
        for (from, to) in shown.difference(&avoided) {
            tracing::info!(prefill = name(from), decode = name(to), "hand-offs may go this way again");
        }
        *shown = avoided;
    }
}

/// Names and ranks by places on the load board.
fn names(snapshot: &Snapshot) -> HashMap<u32, (&str, u32)> {
    let workers = snapshot.fleet().workers().iter();
    workers.map(|worker| (worker.load.index(), (worker.spec.name.as_str(), worker.spec.rank))).collect()
}
