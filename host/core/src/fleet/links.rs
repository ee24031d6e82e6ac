//! Columns of links: what is known of the ways by which KV goes to each candidate.

use std::sync::Arc;

use super::Candidates;
use crate::{
    column::LinkColumn,
    id::WorkerId,
    links::{Link, LinkBoard},
    load::Reported,
    request::Stage,
    worker::{Role, Worker},
};

/// Where the KV of a request comes from, and what is known of the ways from there.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ways<'a> {
    /// The row of the worker that would prefill; `None`: the one that does or did.
    pub from: Option<u32>,
    /// The one that does or did, in the stage [`Stage::Decode`](crate::Stage::Decode).
    pub prefilled_by: Option<WorkerId>,
    /// What is known of links; `None`: nothing.
    pub links: Option<&'a LinkBoard>,
}

impl Candidates {
    /// Whether KV can go to each candidate: 1 yes, 0 no. `now_ms` is the host's monotonic clock.
    #[must_use]
    pub fn reachable_column(&self, ways: Ways<'_>, now_ms: u64) -> Arc<[u32]> {
        if let Some(recorded) = &self.recorded {
            return recorded.reachable_column(ways.from).unwrap_or_else(|| self.iter().map(|_| 0).collect());
        }
        let Some(from) = self.begin_of(ways) else { return self.iter().map(|_| 0).collect() };
        let reaches = |to: &Worker, link: Option<Link>| from.hands_to(to) && !link.is_some_and(|link| link.is_avoided(now_ms));
        self.iter().zip(self.known_from(from, ways)).map(|(to, link)| u32::from(reaches(to, link))).collect()
    }

    /// A column of what was measured of the ways to each candidate.
    #[must_use]
    pub fn link_column(&self, column: LinkColumn, ways: Ways<'_>) -> Arc<[f32]> {
        let unknown = || self.iter().map(|_| f32::NAN).collect();
        if let Some(recorded) = &self.recorded {
            return recorded.link_column(column, ways.from).unwrap_or_else(unknown);
        }
        let measure = match column {
            LinkColumn::TokensPerSecond => Link::tokens_per_second,
            LinkColumn::HandoffMs => Link::handoff_ms,
            LinkColumn::ErrorRate => Link::error_rate,
        };
        let Some(from) = self.begin_of(ways) else { return unknown() };
        self.known_from(from, ways).iter().map(|link| link.as_ref().map_or(f32::NAN, measure)).collect()
    }

    /// The worker that KV would come from.
    fn begin_of(&self, ways: Ways<'_>) -> Option<&Worker> {
        match ways.from {
            Some(row) => (row < self.count()).then(|| self.worker(row)),
            None => ways.prefilled_by.and_then(|id| self.find(id)),
        }
    }

    fn known_from(&self, from: &Worker, ways: Ways<'_>) -> Vec<Option<Link>> {
        ways.links.map_or_else(|| vec![None; self.rows.len()], |links| links.gather(from.load.index(), &self.slots))
    }

    /// Whether workers of different roles are among them.
    #[must_use]
    pub fn have_different_roles(&self) -> bool {
        *self.different_roles.get_or_init(|| {
            let first = self.worker(0).spec.role;
            self.iter().any(|worker| worker.spec.role != first)
        })
    }

    /// The stage in which they are asked about where a request may begin with them: of all of it, unless all only prefill.
    #[must_use]
    pub fn beginning_stage(&self) -> Stage {
        if self.iter().all(|worker| worker.spec.role == Role::Prefill) { Stage::Prefill } else { Stage::Whole }
    }
}

impl Worker {
    /// Tokens of its KV blocks: as configured, else as its engine reports it.
    #[must_use]
    pub fn block_size(&self) -> Option<u32> {
        self.spec.block_size.or_else(|| self.load.get_reported(Reported::BlockSize))
    }

    /// Whether its engine can hand KV to another's. Whether it should, [`LinkBoard`] knows.
    #[must_use]
    pub fn hands_to(&self, other: &Self) -> bool {
        self.spec.role.prefills()
            && other.spec.role.decodes()
            && self.id != other.id
            && self.handoff.group.is_some()
            && self.handoff.group == other.handoff.group
    }
}
