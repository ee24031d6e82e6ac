//! Conditional disaggregation, by Dynamo's rules: a request's prompt is computed by a prefill worker, or by the worker that
//! decodes it, as a rule says.
//!
//! The workers are chosen first, by cached prefix against load: one to prefill, one to decode. Then the rule looks at those two
//! ([`Rule`]): `isl_bounding` at what is left of the prompt on the one that decodes, `prefill_load` at what the one that
//! prefills has to do. A decode worker that is busy prefills for nobody, whatever the rule says. Workers that do all of the work
//! are taken where they cost less than the way so found. Who decodes is decided when the prompt has been computed, by load alone.
//!
//! Whatever it says, it names others of the same kind and then of the other kinds, so that no request fails for want of a role.

mod costs;
mod settings;

use dynamo_policy_sdk::{Candidates, Decision, Request, Router, UNKNOWN, entropy, explain, rank, role, stage, telemetry};

use self::costs::Costs;
pub use self::settings::{Rule, Settings};

/// Rows that a decision holds at most.
const MAX_RANKED: usize = 16;
/// Of those, for the way that is chosen, where there are others.
const CHOSEN_WAY: usize = 12;

/// The policy.
pub struct DisaggConditional {
    settings: Settings,
}

impl Router for DisaggConditional {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        settings.check()?;
        Ok(Self { settings })
    }

    fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
        let seed = entropy::next();
        let costs = Costs::of(&self.settings, request, candidates);
        if request.stage() == stage::DECODE {
            let costs = costs.decode(candidates);
            explain("total", || costs.clone());
            return Decision::Place(rank::lowest_rows(costs, seed));
        }
        let pools = Pools::of(&costs, candidates, seed);
        let way = self.way(request, candidates, &costs, &pools);
        telemetry::counter_add(way.name(), 1);
        explain("way", || vec![way as u32 as f32]);
        explain("total", || costs.first(candidates));
        Decision::Place(pools.ranked(way))
    }
}

/// Where a prompt is computed. Explanations hold its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By the worker that decodes it, whose role is decode.
    Local,
    /// By a prefill worker.
    Remote,
    /// By a worker that does all of the work.
    Aggregated,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Remote => "remote",
            Self::Aggregated => "aggregated",
        }
    }
}

/// Rows by what they do, each the best first.
struct Pools {
    prefill: Vec<u32>,
    decode: Vec<u32>,
    aggregated: Vec<u32>,
}

impl Pools {
    fn of(costs: &Costs, candidates: &Candidates, seed: u64) -> Self {
        let roles = candidates.role();
        let is_split = |&role: &u32| role == role::PREFILL || role == role::DECODE;
        if !roles.iter().any(is_split) {
            let aggregated = rank::lowest_rows(costs.whole.iter().copied(), seed);
            return Self { prefill: Vec::new(), decode: Vec::new(), aggregated };
        }
        let ranked = |costs: &[f32], is: fn(u32) -> bool| -> Vec<u32> {
            let rows: Vec<u32> = (0..).zip(roles).filter(|(_, role)| is(**role)).map(|(row, _)| row).collect();
            let ranked = rank::lowest_rows(rows.iter().map(|&row| costs[row as usize]), seed);
            ranked.into_iter().map(|place| rows[place as usize]).collect()
        };
        let mut prefill = ranked(&costs.prefill, |role| role == role::PREFILL);
        // KV must be able to go somewhere. Asked of the few that are ranked: each costs a column.
        prefill.retain(|&row| candidates.links().reachable(row).contains(&1));
        Self {
            prefill,
            decode: ranked(&costs.whole, |role| role == role::DECODE),
            aggregated: ranked(&costs.whole, |role| role != role::PREFILL && role != role::DECODE),
        }
    }

    /// All rows in the order in which a request may go to them.
    fn ranked(self, way: Way) -> Vec<u32> {
        let Self { prefill, decode, aggregated } = self;
        let [first, others @ ..] = match way {
            Way::Local => [decode, aggregated, prefill],
            Way::Remote => [prefill, aggregated, decode],
            Way::Aggregated => [aggregated, prefill, decode],
        };
        let others: Vec<u32> = others.into_iter().flatten().collect();
        let kept = first.len().min(MAX_RANKED - others.len().min(MAX_RANKED - CHOSEN_WAY));
        first[..kept].iter().copied().chain(others).take(MAX_RANKED).collect()
    }
}

impl DisaggConditional {
    fn way(&self, request: &Request, candidates: &Candidates, costs: &Costs, pools: &Pools) -> Way {
        let decode = pools.decode.first().map(|&row| row as usize);
        let prefill = pools.prefill.first().map(|&row| row as usize);
        let split = match (prefill, decode) {
            (Some(prefill), Some(decode)) => {
                let is_local = self.is_local(request, candidates, costs, prefill, decode);
                let is_busy = self.settings.is_decode_busy(candidates, decode);
                match is_local && !is_busy {
                    true => Some((Way::Local, costs.whole[decode])),
                    false => Some((Way::Remote, costs.prefill[prefill] + costs.context[decode])),
                }
            }
            // Those that do all of it decode for others, too.
            (Some(prefill), None) => {
                let context = pools.aggregated.first().map_or(0.0, |&row| costs.context[row as usize]);
                Some((Way::Remote, costs.prefill[prefill] + context))
            }
            (None, Some(decode)) => Some((Way::Local, costs.whole[decode])),
            (None, None) => None,
        };
        let aggregated = pools.aggregated.first().map(|&row| costs.whole[row as usize]);
        match (split, aggregated) {
            (Some((_, split)), Some(aggregated)) if aggregated < split => Way::Aggregated,
            (Some((way, _)), _) => way,
            (None, _) => Way::Aggregated,
        }
    }

    fn is_local(&self, request: &Request, candidates: &Candidates, costs: &Costs, prefill: usize, decode: usize) -> bool {
        let settings = &self.settings;
        let prompt = known(request.prompt_tokens());
        let left = prompt - costs.cached[decode].min(prompt);
        let is_any_share = settings.local_below_ratio >= 1.0;
        let is_small = is_any_share || left < settings.local_below_ratio * prompt;
        let is_short = left < settings.local_below_tokens as f32 && is_small;
        let is_busy = known(candidates.active_uncached_tokens()[prefill]) > settings.prefill_busy_above_tokens as f32;
        match settings.rule {
            Rule::IslBounding => is_short,
            Rule::PrefillLoad => is_busy,
            Rule::IslOrLoad => is_short || is_busy,
        }
    }
}

impl Settings {
    /// Whether a worker has so much to decode that it should not prefill as well. What nobody knows makes it not busy.
    fn is_decode_busy(&self, candidates: &Candidates, row: usize) -> bool {
        let context = known(candidates.active_decode_tokens()[row]) + known(candidates.active_prefill_tokens()[row]);
        if self.decode_busy_above_tokens.is_some_and(|most| context > most as f32) {
            return true;
        }
        let total = candidates.kv_tokens_total()[row];
        if total == UNKNOWN {
            return false;
        }
        // What the engine says is older than what the host counts, and knows of more.
        let reported = match candidates.kv_tokens_free()[row] {
            UNKNOWN => 0.0,
            free => total.saturating_sub(free) as f32,
        };
        context.max(reported) > self.decode_busy_above_kv_ratio * total as f32
    }
}

/// 0 for what is unknown: an overlap or a load that nobody knows of is none.
fn known(tokens: u32) -> f32 {
    if tokens == UNKNOWN { 0.0 } else { tokens as f32 }
}

dynamo_policy_sdk::register!(DisaggConditional);

#[cfg(test)]
mod tests;
