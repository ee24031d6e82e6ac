//! Hand-off: whether a request is served whole, or prefilled on one worker and decoded on another; and where.
//!
//! All ways are costs in milliseconds, made of the terms in [`cost`](crate::cost):
//!
//! | way | cost |
//! |---|---|
//! | whole, also on a decode worker that prefills for itself | the first token's time, what it stalls, `decode`, `cache`, `memory` |
//! | prefill | the first token's time with the hand-off, what it stalls, `cache`, `memory` |
//! | decode | `decode`, `memory`, what waits to be prefilled there, what is left to be fetched |
//!
//! The first token's time counts more the longer it is ([`late`](Handoff::late)): it is the long prompts that make the tail, and a
//! short one can wait behind them. What a prefill stalls is priced by how many gaps between tokens would be stalled if
//! nobody handed over ([`Demand`]): below the share that an operator does not mind it costs what it costs an aggregated
//! fleet, and above it much more. A worker that does both is kept free of decoding by its place: as many as there is
//! prefill work for, the first ones by id, which is the same on every host and at every moment without anybody keeping it.
//!
//! The best prefill, the best decode and the best whole are found apart: costs are linear in the number of workers. Pairs
//! are answered for workers that do both, since placed alone they would serve it whole; else the prefill is placed, and
//! the host asks again who goes on when it is done, and more is known.

use dynamo_policy_sdk::{Candidates, Decision, Request, UNKNOWN, endpoint, entropy, explain, explain_wanted, rank, role, stage};

use crate::{
    Settings,
    cost::{self, Costs, Terms, least, most},
    links::Links,
    profile::Profiles,
};

/// Workers that prefill which are looked at for somebody to hand over to.
const STARTS: usize = 3;
/// Workers that decode which are named for the first of them.
const NEXTS: usize = 8;
/// How much more stalls count on workers that decode and do nothing else, at any load: whoever runs such minds them.
const DEDICATED: f32 = 2.0;
/// Over how many workers the keeping free fades out.
const FADE: f32 = 3.0;
/// Way of a request that is no way for it.
const NONE: f32 = f32::INFINITY;

/// A prefill, its cost, and who goes on, the best first with its cost.
struct Start {
    row: u32,
    cost: f32,
    onward: f32,
    next: Vec<u32>,
}

/// What going on costs on each worker, but for the way of the KV.
struct Continued {
    costs: Vec<f32>,
    lacking: Vec<f32>,
}

/// What the costs of hand-offs are made of.
pub(crate) struct Handoff<'a> {
    settings: &'a Settings,
    candidates: &'a Candidates,
    profiles: &'a Profiles,
    costs: &'a Costs<'a>,
    roles: &'a [u32],
    demand: Demand,
    /// Milliseconds of a first token's time that count double.
    late_ms: f32,
}

impl<'a> Handoff<'a> {
    /// `None` where nobody could hand over this request, so that all of it happens on one worker.
    pub(crate) fn of(
        settings: &'a Settings,
        request: &Request,
        candidates: &'a Candidates,
        profiles: &'a Profiles,
        costs: &'a Costs<'a>,
    ) -> Option<Self> {
        let roles = candidates.role();
        let is_apart = match request.stage() {
            stage::DECODE => true,
            stage::WHOLE => cost::is_apart(candidates) && roles.iter().any(|&of| prefills(of)) && may_hand_over(request),
            _ => false,
        };
        let target = request.slo_ttft_ms();
        let late_ms = if target > 0.0 { target } else { settings.handoff.late_ms };
        is_apart.then(|| Self {
            settings,
            candidates,
            profiles,
            costs,
            roles,
            demand: Demand::of(settings, candidates, profiles, costs),
            late_ms,
        })
    }

    /// Where it goes on, when it was prefilled or while it is.
    pub(crate) fn decode(&self) -> Decision {
        let costs = self.onward(&self.continued(), None);
        explain("onward_ms", || costs.clone());
        Decision::Place(finite(&costs).unwrap_or_else(|| rank::lowest_rows(self.costs.total(self.profiles), entropy::next())))
    }

    /// Where it goes.
    pub(crate) fn place(&self) -> Decision {
        let whole = self.whole();
        let prefill = self.prefill();
        let continued = self.continued();
        let starts = self.starts(&prefill, &continued);
        let pair = starts.iter().find(|start| self.roles[start.row as usize] == role::BOTH);
        let single = starts.iter().find(|start| self.roles[start.row as usize] == role::PREFILL);
        let onward = single.map_or(NONE, |start| start.onward);
        let placed: Vec<f32> = (whole.iter().zip(&prefill).zip(self.roles))
            .map(|((&whole, &prefill), &of)| if of == role::PREFILL { prefill + onward } else { whole })
            .collect();
        self.explain(&whole, &prefill, &continued, &starts);
        let least_placed = placed.iter().copied().fold(NONE, least);
        match pair {
            Some(pair) if pair.cost + pair.onward < least_placed => Decision::PlaceDisaggregated(self.pairs(&starts)),
            _ => match finite(&placed) {
                Some(rows) => Decision::Place(rows),
                // Only those are left that prefill, and KV gets nowhere from there at present: the host knows what to do then.
                None => rank::lowest(prefill),
            },
        }
    }

    /// The first token's time as it counts: the longer, the more.
    fn late(&self, ms: f32) -> f32 {
        ms + ms * ms / self.late_ms
    }

    /// Costs of a prefill: the first token's time, which is `handoff` later, and what is no concern of roles.
    fn begin(&self, handoff: f32, others: impl Fn(Terms) -> f32) -> Vec<f32> {
        let cost = |terms: Terms| {
            let first = self.late(terms.wait + terms.prefill + handoff);
            (first + terms.interference + terms.cache + terms.memory + others(terms)) * terms.factor
        };
        let mut costs = self.costs.each(self.profiles, cost);
        let price = self.settings.handoff.stall;
        let stalls = self.costs.each(self.profiles, |terms| price * terms.stall * terms.decoding * terms.factor);
        for ((cost, stall), &of) in costs.iter_mut().zip(stalls).zip(self.roles) {
            *cost += stall * if of == role::DECODE { DEDICATED } else { self.demand.pressure };
        }
        costs
    }

    fn whole(&self) -> Vec<f32> {
        let mut costs = self.begin(0.0, |terms| terms.decode);
        self.level(&mut costs);
        self.keep_free(&mut costs);
        self.only(&mut costs, |of| of != role::PREFILL);
        costs
    }

    fn prefill(&self) -> Vec<f32> {
        let mut costs = self.begin(self.settings.handoff.expected_ms(self.costs.prompt()), |_| 0.0);
        self.only(&mut costs, prefills);
        costs
    }

    /// Leaves the costs of workers of some roles; for the others it is no way.
    fn only(&self, costs: &mut [f32], does: impl Fn(u32) -> bool) {
        for (cost, &of) in costs.iter_mut().zip(self.roles) {
            if !does(of) {
                *cost = NONE;
            }
        }
    }

    /// Costs of going on, wherever the KV comes from, and the tokens that are not there yet.
    fn continued(&self) -> Continued {
        let cost = |terms: Terms| (terms.wait + terms.decode + terms.memory) * terms.factor;
        let mut costs = self.costs.each(self.profiles, cost);
        self.level(&mut costs);
        self.keep_free(&mut costs);
        Continued { costs, lacking: self.costs.each(self.profiles, |terms| terms.uncached) }
    }

    /// Costs of going on, from a row or from the worker that prefills by now. What a hand-off is expected to take is in the cost of
    /// the prefill.
    fn onward(&self, continued: &Continued, from: Option<u32>) -> Vec<f32> {
        let links = Links::of(self.settings, self.candidates, from);
        let expected = self.settings.handoff.expected_ms(self.costs.prompt());
        let cost = |(row, (&cost, &lacking)): (usize, (&f32, &f32))| {
            if links.is_reachable(row) { (cost + links.ms(row, lacking) - expected) * links.tries(row) } else { NONE }
        };
        continued.costs.iter().zip(&continued.lacking).enumerate().map(cost).collect()
    }

    /// The best ones to begin on from which KV gets somewhere.
    fn starts(&self, prefill: &[f32], continued: &Continued) -> Vec<Start> {
        let mut starts: Vec<Start> = Vec::new();
        for row in finite(prefill).unwrap_or_default().into_iter().take(STARTS) {
            let onward = self.onward(continued, Some(row));
            if let Some(mut next) = finite(&onward) {
                next.truncate(NEXTS);
                starts.push(Start { row, cost: prefill[row as usize], onward: onward[next[0] as usize], next });
            }
        }
        starts
    }

    /// All that the best start can go on to, then the best of the others.
    fn pairs(&self, starts: &[Start]) -> Vec<(u32, u32)> {
        let of_both = || starts.iter().filter(|start| self.roles[start.row as usize] == role::BOTH);
        let first = of_both().take(1).flat_map(|start| start.next.iter().map(|&next| (start.row, next)));
        first.chain(of_both().skip(1).map(|start| (start.row, start.next[0]))).collect()
    }

    /// Keeps the contexts of workers level that decode and do nothing else: the longest make the slowest tokens. On others
    /// stalls do, and being few matters more.
    fn level(&self, costs: &mut [f32]) {
        if !self.roles.contains(&role::DECODE) {
            return;
        }
        let levels = self.costs.each(self.profiles, |terms| terms.level * terms.factor);
        for ((cost, level), &of) in costs.iter_mut().zip(levels).zip(self.roles) {
            if of == role::DECODE {
                *cost += level;
            }
        }
    }

    /// What decoding costs on workers that are to prefill.
    fn keep_free(&self, costs: &mut [f32]) {
        let Demand { prefill, pressure, pass } = self.demand;
        if pressure == 0.0 || prefill <= 0.0 {
            return;
        }
        // As many as have work, and some that arrivals are not spread evenly.
        let needed = prefill + self.settings.handoff.spare * prefill.sqrt();
        let price = pressure * self.settings.handoff.keep_free * pass;
        let mut place = 0.0;
        for (cost, &of) in costs.iter_mut().zip(self.roles) {
            if of == role::BOTH {
                *cost += price * least(most((needed - place) / FADE, 0.0), 1.0);
                place += 1.0;
            }
        }
    }

    fn explain(&self, whole: &[f32], prefill: &[f32], continued: &Continued, starts: &[Start]) {
        if !explain_wanted() {
            return;
        }
        explain("whole_ms", || whole.to_vec());
        explain("prefill_leg_ms", || prefill.to_vec());
        explain("onward_ms", || {
            starts.first().map_or_else(|| vec![NONE; whole.len()], |start| self.onward(continued, Some(start.row)))
        });
    }
}

/// What the fleet is asked for, by what runs now.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Demand {
    /// Prefill, in workers that it keeps busy, less those that do nothing else.
    prefill: f32,
    /// 0 to 1: how much stalls matter.
    pressure: f32,
    /// Milliseconds of a full pass.
    pass: f32,
}

impl Demand {
    fn of(settings: &Settings, candidates: &Candidates, profiles: &Profiles, costs: &Costs) -> Self {
        let speed = profiles.first();
        let profile = &speed.profile;
        let sum = |column: &[u32]| column.iter().filter(|&&value| value != UNKNOWN).map(|&value| value as f32).sum::<f32>();
        let context = sum(candidates.active_decode_tokens());
        let prefilling = sum(candidates.active_prefill_tokens());
        let decoding = sum(candidates.active_requests()) * context / most(context + prefilling, 1.0);
        let roles = candidates.role();
        let only = roles.iter().filter(|&&of| of == role::PREFILL).count() as f32;
        let others = most(roles.len() as f32 - only, 1.0);
        let none = Self { prefill: 0.0, pressure: 0.0, pass: speed.full_pass_ms };
        if decoding < 1.0 {
            return none;
        }
        let output = costs.output();
        let prompt = context / decoding;
        // By Little's law: what runs, by how long it takes, is how often one comes. Each has a prompt to be computed.
        let per_worker = 2.0 * decoding / others;
        let step =
            profile.decode_ms_base + per_worker * (profile.decode_ms_per_sequence + profile.decode_ms_per_context_token * prompt);
        let prefill = decoding * speed.prefill_ms(prompt) / (output * step);
        // Gaps between tokens that a prefill would stall, of all, if it went where others decode.
        let stalled = decoding / others * (1.0 + prompt / profile.max_batched_tokens) / output;
        let settings = &settings.handoff;
        let pressure = (stalled - settings.stalls_from) / most(settings.stalls_to - settings.stalls_from, 1e-6);
        Self { prefill: prefill - only, pressure: least(most(pressure, 0.0), 1.0), ..none }
    }
}

/// Whether engines do that for such a request.
fn may_hand_over(request: &Request) -> bool {
    matches!(request.endpoint(), endpoint::CHAT_COMPLETION | endpoint::TEXT_COMPLETION)
        && request.choices() == 1
        && request.multimodal_items() == 0
        && request.generated_tokens() == 0
        && request.max_output_tokens() > 1
}

fn prefills(of: u32) -> bool {
    of == role::PREFILL || of == role::BOTH
}

/// The rows of lowest cost without those that are no way; `None` if none is.
fn finite(costs: &[f32]) -> Option<Vec<u32>> {
    let mut rows = rank::lowest_rows(costs.iter().copied(), entropy::next());
    rows.retain(|&row| costs[row as usize] < NONE);
    (!rows.is_empty()).then_some(rows)
}

#[cfg(test)]
mod tests;
