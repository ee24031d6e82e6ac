//! Links: how long KV takes from one worker to the others.
//!
//! Before a way was used, its topology says how quick it is. What was measured scales that: times as the host sees them hold a
//! wait for the decode worker's step, too, so that a way counts as slower than the best one from the same worker only where
//! it is so by far.

use dynamo_policy_sdk::{Candidates, UNKNOWN, rank::Lowest, topology};

use crate::{
    HandoffSettings, LinkSpeed,
    cost::{least, most},
};

/// How many times as slow a way is before it is told from chance.
const BY_FAR: f32 = 4.0;
/// How much quicker or slower than their topology says all ways from a worker can be: hand-offs that wait for the memory of busy
/// workers look slow, too, and whoever decodes there waits for that, handed over or not.
const ALL: (f32, f32) = (0.25, 10.0);
/// How much slower one way can be.
const ONE: f32 = 1000.0;
/// Share of errors that counts at most.
const MOST_ERRORS: f32 = 0.9;

/// Where the workers are, by level.
pub(crate) struct Places {
    zones: Vec<u32>,
    racks: Vec<u32>,
    hosts: Vec<u32>,
}

impl Places {
    pub(crate) fn of(candidates: &Candidates) -> Self {
        let [zones, racks, hosts] = [topology::ZONE, topology::RACK, topology::HOST].map(|level| candidates.topology(level));
        Self { zones, racks, hosts }
    }
}

/// What a way is judged by: where it ends, and what was measured.
#[derive(Clone, Copy)]
struct Way {
    zone: u32,
    rack: u32,
    host: u32,
    rate: f32,
    ms: f32,
    reachable: u32,
    errors: f32,
}

/// How ways from one worker are judged.
#[derive(Clone, Copy)]
struct Judge {
    /// Where it is itself; unknown where it has none.
    own_zone: u32,
    own_rack: u32,
    own_host: u32,
    /// Milliseconds per token, by the closest level that both are known to share.
    token_ms: LinkSpeed,
    base_ms: f32,
    /// What of a hand-off is paid for already.
    expected_ms: f32,
    /// The least of how much longer ways took than by topology; infinite where none was gone.
    best: f32,
    /// By how much all are slower than by topology.
    all: f32,
}

impl Judge {
    #[inline(always)]
    fn token_ms(&self, way: &Way) -> f32 {
        let LinkSpeed { host, rack, zone, elsewhere, unknown } = self.token_ms;
        let is_in = |place: u32, own: u32| (place == own) & (place != UNKNOWN);
        let far = if (self.own_zone != UNKNOWN) & (way.zone != UNKNOWN) { elsewhere } else { unknown };
        let ms = if is_in(way.zone, self.own_zone) { zone } else { far };
        let ms = if is_in(way.rack, self.own_rack) { rack } else { ms };
        if is_in(way.host, self.own_host) { host } else { ms }
    }

    /// How many times as long as by topology what arrived took on average; NaN where nothing did.
    #[inline(always)]
    fn measured(&self, way: &Way) -> f32 {
        way.ms / (self.base_ms + way.rate * way.ms / 1000.0 * self.token_ms(way))
    }

    /// What going on there costs with the way: `cost` without it, for the KV of so many tokens that are lacking there. Infinite where
    /// there is no way.
    #[inline(always)]
    fn onward(&self, way: &Way, cost: f32, lacking: f32) -> f32 {
        let measured = self.measured(way);
        let scale = if measured > BY_FAR * self.best { least(measured, ONE) } else { self.all };
        let ms = scale * (self.base_ms + self.token_ms(way) * lacking);
        // Unknown errors are none: no comparison with NaN is true.
        let tries = 1.0 / (1.0 - least(way.errors, MOST_ERRORS));
        let tries = if way.errors > 0.0 { tries } else { 1.0 };
        let cost = (cost + ms - self.expected_ms) * tries;
        if way.reachable == 1 { cost } else { f32::INFINITY }
    }

    /// What of a cost and of a lacking token no way is quicker than, so that who lies above `highest` by these need not be looked at.
    fn bound(&self) -> Bound {
        let LinkSpeed { host, rack, zone, elsewhere, unknown } = self.token_ms;
        let scale = least(self.all, BY_FAR * self.best);
        let token_ms = scale * [host, rack, zone, elsewhere].into_iter().fold(unknown, least);
        Bound { token_ms, base_ms: scale * self.base_ms - self.expected_ms, slack: scale * self.base_ms + self.expected_ms }
    }
}

/// The quickest way that there could be.
struct Bound {
    token_ms: f32,
    base_ms: f32,
    /// What numbers are rounded by is a small share of this and the cost.
    slack: f32,
}

impl Bound {
    /// The sum of cost and tokens' time above which no worker costs at most `highest`. Errors make more of a cost above 0, and less of
    /// one below.
    fn highest(&self, highest: f32) -> f32 {
        let highest = most(highest, 0.0);
        highest - self.base_ms + 1e-5 * (highest + self.slack)
    }
}

/// The ways from one worker, to all in row order.
pub(crate) struct Links<'a> {
    places: &'a Places,
    rates: Vec<f32>,
    times: Vec<f32>,
    reachable: Vec<u32>,
    error_rate: Vec<f32>,
    judge: Judge,
}

impl<'a> Links<'a> {
    /// From a row, or from the worker that prefills by now.
    pub(crate) fn of(
        settings: &HandoffSettings,
        candidates: &Candidates,
        places: &'a Places,
        from: Option<u32>,
        expected_ms: f32,
    ) -> Self {
        let links = candidates.links();
        let row = from.map(|row| row as usize).or_else(|| candidates.worker_id().binary_search(&links.prefilled_by()?).ok());
        let own = |places: &[u32]| row.map_or(UNKNOWN, |row| places[row]);
        let LinkSpeed { host, rack, zone, elsewhere, unknown } = settings.tokens_per_second;
        let [host, rack, zone, elsewhere, unknown] = [host, rack, zone, elsewhere, unknown].map(|rate| 1000.0 / rate);
        let mut links = Self {
            places,
            rates: links.tokens_per_second(from),
            times: links.handoff_ms(from),
            reachable: links.reachable(from),
            error_rate: links.error_rate(from),
            judge: Judge {
                own_zone: own(&places.zones),
                own_rack: own(&places.racks),
                own_host: own(&places.hosts),
                token_ms: LinkSpeed { host, rack, zone, elsewhere, unknown },
                base_ms: settings.base_ms,
                expected_ms,
                best: f32::INFINITY,
                all: 1.0,
            },
        };
        let best = links.best();
        if best < f32::INFINITY {
            (links.judge.best, links.judge.all) = (best, least(most(best, ALL.0), ALL.1));
        }
        links
    }

    /// What was measured of the best way.
    fn best(&self) -> f32 {
        let mut best = f32::INFINITY;
        let (blocks, rest) = self.times.as_chunks::<{ Lowest::BLOCK }>();
        let rest_from = self.times.len() - rest.len();
        // Few of many ways were gone.
        let gone = |times: &[f32; Lowest::BLOCK]| times.iter().fold(0, |any, ms| any | u32::from(!ms.is_nan())) != 0;
        let blocks = blocks.iter().enumerate().filter(|(_, times)| gone(times)).map(|(block, _)| block * Lowest::BLOCK);
        for row in blocks.flat_map(|first| first..first + Lowest::BLOCK).chain(rest_from..self.times.len()) {
            best = least(best, self.judge.measured(&self.way(row)));
        }
        best
    }

    fn way(&self, row: usize) -> Way {
        let Places { zones, racks, hosts } = self.places;
        Way {
            zone: zones[row],
            rack: racks[row],
            host: hosts[row],
            rate: self.rates[row],
            ms: self.times[row],
            reachable: self.reachable[row],
            errors: self.error_rate[row],
        }
    }

    /// What going on costs on each worker, of what it `costs` but for the way.
    pub(crate) fn costs(&self, costs: &[f32], lacking: &[f32]) -> Vec<f32> {
        (0..costs.len()).map(|row| self.judge.onward(&self.way(row), costs[row], lacking[row])).collect()
    }

    /// The rows where that is the least, and it. Of most workers not even the quickest way that there could be would do, and so theirs
    /// is not looked at.
    pub(crate) fn lowest(&self, costs: &[f32], lacking: &[f32], seed: u64) -> Vec<(u32, f32)> {
        let bound = self.judge.bound();
        let mut lowest = Lowest::finite(seed);
        let (blocks, rest) = costs.as_chunks::<{ Lowest::BLOCK }>();
        for (block, (costs, lacking)) in blocks.iter().zip(lacking.as_chunks::<{ Lowest::BLOCK }>().0).enumerate() {
            let highest = bound.highest(lowest.highest());
            let may = |(&cost, &lacking)| u32::from(cost + bound.token_ms * lacking <= highest);
            if costs.iter().zip(lacking).map(may).fold(0, |any, may| any | may) != 0 {
                let first = block * Lowest::BLOCK;
                lowest.add_block(first as u32, &self.block(first, costs, lacking));
            }
        }
        let onward = |row: usize| self.judge.onward(&self.way(row), costs[row], lacking[row]);
        let first = costs.len() - rest.len();
        let rest: Vec<f32> = (first..costs.len()).map(onward).collect();
        lowest.add(first as u32, &rest);
        lowest.rows().into_iter().map(|row| (row, onward(row as usize))).collect()
    }

    /// A function of its own with columns of one length, so that the loop becomes SIMD.
    #[inline(never)]
    fn block(&self, first: usize, costs: &[f32; Lowest::BLOCK], lacking: &[f32; Lowest::BLOCK]) -> [f32; Lowest::BLOCK] {
        fn of<T>(column: &[T], first: usize) -> &[T; Lowest::BLOCK] {
            column[first..].first_chunk().expect("columns are as long as each other")
        }
        let (judge, Places { zones, racks, hosts }) = (self.judge, self.places);
        let places = of(zones, first).iter().zip(of(racks, first)).zip(of(hosts, first));
        let speeds = of(&self.rates, first).iter().zip(of(&self.times, first));
        let fates = of(&self.reachable, first).iter().zip(of(&self.error_rate, first));
        let rows = costs.iter().zip(lacking).zip(places).zip(speeds).zip(fates);
        let mut onward = [0.0; Lowest::BLOCK];
        for (onward, row) in onward.iter_mut().zip(rows) {
            let ((((&cost, &lacking), ((&zone, &rack), &host)), (&rate, &ms)), (&reachable, &errors)) = row;
            *onward = judge.onward(&Way { zone, rack, host, rate, ms, reachable, errors }, cost, lacking);
        }
        onward
    }
}
