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
//! The first token's time counts more the longer it is (`late`): it is the long prompts that make the tail, and a
//! short one can wait behind them. What a prefill stalls is priced by how many gaps between tokens would be stalled if
//! nobody handed over ([`Demand`]): below the share that an operator does not mind it costs what it costs an aggregated
//! fleet, and above it much more. A worker that does both is kept free of decoding by its place: as many as there is
//! prefill work for, the first ones by id, which is the same on every host and at every moment without anybody keeping it.
//!
//! The best prefill, the best decode and the best whole are found apart: costs are linear in the number of workers. Pairs
//! are answered for workers that do both, since placed alone they would serve it whole; else the prefill is placed, and
//! the host asks again who goes on when it is done, and more is known.

use std::cell::OnceCell;

use dynamo_policy_sdk::{Candidates, Decision, Request, UNKNOWN, endpoint, entropy, explain, explain_wanted, rank, role, stage};

use crate::{
    Settings,
    cost::{Costs, Terms, least, most},
    links::{Links, Places},
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
    /// Of the first that goes on; unknown of a start that is there to fall back on.
    onward: f32,
    next: Vec<u32>,
}

/// What each worker costs.
struct Ways {
    /// To serve all of it.
    whole: Vec<f32>,
    /// To prefill.
    prefill: Vec<f32>,
    /// To go on, but for the way of the KV.
    continued: Vec<f32>,
}

/// What the costs of hand-offs are made of.
pub(crate) struct Handoff<'a> {
    settings: &'a Settings,
    candidates: &'a Candidates,
    profiles: &'a Profiles,
    costs: &'a Costs<'a>,
    roles: &'a [u32],
    demand: Demand,
    /// Asked for once somebody could hand over.
    places: OnceCell<Places>,
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
            stage::WHOLE => costs.is_apart() && roles.iter().any(|&of| prefills(of)) && may_hand_over(request),
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
            places: OnceCell::new(),
            late_ms,
        })
    }

    /// Where it goes on, when it was prefilled or while it is.
    pub(crate) fn decode(&self) -> Decision {
        let continued = self.ways().continued;
        let links = self.links(None);
        explain("onward_ms", || links.costs(&continued, self.costs.uncached()));
        let rows: Vec<u32> = self.onward(&links, &continued, entropy::next()).into_iter().map(|(row, _)| row).collect();
        // If there is no way to anybody, the host knows what to do.
        Decision::Place(if rows.is_empty() { rank::lowest_rows(self.costs.total(self.profiles), entropy::next()) } else { rows })
    }

    /// Where it goes.
    pub(crate) fn place(&self) -> Decision {
        let ways = self.ways();
        let starts = self.starts(&ways);
        let pair = starts.iter().find(|start| self.roles[start.row as usize] == role::BOTH);
        let single = starts.iter().find(|start| self.roles[start.row as usize] == role::PREFILL);
        let onward = single.map_or(NONE, |start| start.onward);
        self.explain(&ways, &starts);
        let Ways { whole, prefill, .. } = ways;
        let mut placed = whole;
        for ((placed, &prefill), &of) in placed.iter_mut().zip(&prefill).zip(self.roles) {
            // Added in all rows, since a choice of numbers is SIMD, and a choice of what to do is not.
            let single = prefill + onward;
            *placed = if of == role::PREFILL { single } else { *placed };
        }
        let mut rows = rank::lowest_finite_rows(&placed, entropy::next());
        let least_placed = rows.first().map_or(NONE, |&row| placed[row as usize]);
        match pair {
            Some(pair) if pair.cost + pair.onward < least_placed => Decision::PlaceDisaggregated(self.pairs(&starts)),
            _ if !rows.is_empty() => {
                self.fall_back_on(&starts, &mut rows);
                Decision::Place(rows)
            }
            // Only those are left that prefill, and KV gets nowhere from there at present: the host knows what to do then.
            _ => rank::lowest(prefill),
        }
    }

    /// Puts who prefills last where nobody of them is ranked. Decode engines of some kinds serve nothing whole: the host knows and
    /// passes them over, and would have to choose for itself where all are such.
    fn fall_back_on(&self, starts: &[Start], rows: &mut Vec<u32>) {
        let is_single = |row: u32| self.roles[row as usize] == role::PREFILL;
        if rows.iter().all(|&row| self.roles[row as usize] == role::DECODE) {
            let singles: Vec<u32> = starts.iter().map(|start| start.row).filter(|&row| is_single(row)).collect();
            rows.truncate(rank::MAX_RANKED - singles.len());
            rows.extend(singles);
        }
    }

    /// All of them, in one loop over the workers.
    fn ways(&self) -> Ways {
        let (mut prefill, mut continued) = (vec![NONE; self.roles.len()], self.kept_free());
        Ways { whole: self.fill(&mut prefill, &mut continued), prefill, continued }
    }

    /// A function of its own, so that the columns are known to be apart: else the loop is no SIMD.
    #[inline(never)]
    fn fill(&self, prefill: &mut [f32], continued: &mut [f32]) -> Vec<f32> {
        let late_ms = self.late_ms;
        // The longer, the more.
        let late = |ms: f32| ms + ms * ms / late_ms;
        let expected = self.settings.handoff.expected_ms(self.costs.prompt());
        let (price, pressure) = (self.settings.handoff.stall, self.demand.pressure);
        let values = |terms: Terms, of: u32, kept: f32| {
            let Terms { wait, prefill, interference, decode, cache, memory, factor, .. } = terms;
            let (decodes_only, prefills_only) = (of == role::DECODE, of == role::PREFILL);
            let stall = price * terms.stall * terms.decoding * factor * if decodes_only { DEDICATED } else { pressure };
            // Contexts of workers that decode and do nothing else are kept level: the longest make the slowest tokens. On others
            // stalls do, and being few matters more.
            let level = if decodes_only { terms.level * factor } else { 0.0 };
            let whole = (late(wait + prefill) + interference + cache + memory + decode) * factor + stall + level + kept;
            let leg = (late(wait + prefill + expected) + interference + cache + memory) * factor + stall;
            let continued = (wait + decode + memory) * factor + level + kept;
            let prefills = prefills_only | (of == role::BOTH);
            let decodes = !prefills_only & (of != role::AGGREGATED);
            let only = |does: bool, cost: f32| if does { cost } else { NONE };
            [only(!prefills_only, whole), only(prefills, leg), only(decodes, continued)]
        };
        self.costs.fill(self.profiles, self.roles, [prefill, continued], values)
    }

    /// The ways from a row, or from the worker that prefills by now. What a hand-off is expected to take is in the cost of the prefill.
    fn links(&self, from: Option<u32>) -> Links<'_> {
        let settings = &self.settings.handoff;
        let places = self.places.get_or_init(|| Places::of(self.candidates));
        Links::of(settings, self.candidates, places, from, settings.expected_ms(self.costs.prompt()))
    }

    /// Where going on costs the least, by these ways.
    fn onward(&self, links: &Links, continued: &[f32], seed: u64) -> Vec<(u32, f32)> {
        links.lowest(continued, self.costs.uncached(), seed)
    }

    /// The best ones to begin on from which KV gets somewhere. In full the first one to be placed alone and the first one of pairs; of
    /// others, which are there to fall back on, who goes on from those found so far.
    fn starts(&self, ways: &Ways) -> Vec<Start> {
        let mut starts: Vec<Start> = Vec::new();
        for row in rank::lowest_finite_rows(&ways.prefill, entropy::next()).into_iter().take(STARTS) {
            let (cost, seed) = (ways.prefill[row as usize], entropy::next());
            let like = starts.iter().find(|start| self.roles[start.row as usize] == self.roles[row as usize]);
            if let Some(next) = like.map(|like| self.reached(row, &like.next)).filter(|next| !next.is_empty()) {
                starts.push(Start { row, cost, onward: NONE, next });
                continue;
            }
            let mut next = self.onward(&self.links(Some(row)), &ways.continued, seed);
            next.truncate(NEXTS);
            if let Some(&(_, onward)) = next.first() {
                starts.push(Start { row, cost, onward, next: next.into_iter().map(|(row, _)| row).collect() });
            }
        }
        starts
    }

    /// Of these, the ones to which KV gets from a row.
    fn reached(&self, from: u32, next: &[u32]) -> Vec<u32> {
        let reachable = self.candidates.links().reachable(from);
        next.iter().copied().filter(|&row| reachable[row as usize] == 1).collect()
    }

    /// All that the best start can go on to, then the best of the others.
    fn pairs(&self, starts: &[Start]) -> Vec<(u32, u32)> {
        let of_both = || starts.iter().filter(|start| self.roles[start.row as usize] == role::BOTH);
        let first = of_both().take(1).flat_map(|start| start.next.iter().map(|&next| (start.row, next)));
        first.chain(of_both().skip(1).map(|start| (start.row, start.next[0]))).collect()
    }

    /// What decoding costs on each worker for being one that is to prefill.
    fn kept_free(&self) -> Vec<f32> {
        let mut kept = vec![0.0; self.roles.len()];
        let Demand { prefill, pressure, pass } = self.demand;
        if pressure == 0.0 || prefill <= 0.0 {
            return kept;
        }
        // As many as have work, and some that arrivals are not spread evenly.
        let needed = prefill + self.settings.handoff.spare * prefill.sqrt();
        let price = pressure * self.settings.handoff.keep_free * pass;
        let mut place = 0.0;
        for (kept, &of) in kept.iter_mut().zip(self.roles) {
            if of == role::BOTH {
                *kept = price * least(most((needed - place) / FADE, 0.0), 1.0);
                place += 1.0;
                if place >= needed {
                    break;
                }
            }
        }
        kept
    }

    fn explain(&self, ways: &Ways, starts: &[Start]) {
        if !explain_wanted() {
            return;
        }
        explain("whole_ms", || ways.whole.clone());
        explain("prefill_leg_ms", || ways.prefill.clone());
        explain("onward_ms", || {
            let onward = |start: &Start| self.links(Some(start.row)).costs(&ways.continued, self.costs.uncached());
            starts.first().map_or_else(|| vec![NONE; ways.whole.len()], onward)
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

/// The sum of what is known of a column. In lanes, which is SIMD.
fn sum(column: &[u32]) -> f32 {
    const LANES: usize = 4;
    let known = |value: u32| if value == UNKNOWN { 0.0 } else { value as f32 };
    let (chunks, rest) = column.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for chunk in chunks {
        for (sum, &value) in sums.iter_mut().zip(chunk) {
            *sum += known(value);
        }
    }
    sums.into_iter().chain(rest.iter().map(|&value| known(value))).sum()
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

#[cfg(test)]
mod tests;
