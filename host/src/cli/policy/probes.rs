//! Probes: the made-up decisions that `policy check` asks for.
//!
//! Each stands for a situation that policies get wrong: one candidate, many, nothing known of anybody, some things of some,
//! a session, a retry, a very long prompt, recorded reasons.

use std::sync::Arc;

use dynamo_host_core::{RequestFacts, TokenCount, id::WorkerId, load::Recent};
use dynamo_host_policy::{RouteCall, synthetic};

/// Candidates of probes that are not about their number.
const SOME: u32 = 64;

/// Candidates that a policy should be able to decide for; one that cannot is warned about.
pub(super) const MANY: u32 = 10_000;

/// A made-up decision.
pub(super) struct Probe {
    /// What it is about.
    pub(super) name: &'static str,
    pub(super) candidates: u32,
    pub(super) call: RouteCall,
    /// Keeps up the load of the candidates.
    _fleet: synthetic::SyntheticFleet,
}

/// All probes, the cheapest first.
pub(super) fn all() -> Vec<Probe> {
    let plain = |_: &mut RequestFacts| {};
    let mut probes = vec![
        probe("one candidate", 1, 0, plain),
        probe("few candidates", 4, 0, plain),
        probe("nothing observed", SOME, 0, plain),
        probe("some observed", SOME, 2, plain),
        probe("all observed", SOME, 1, plain),
        probe("a session", SOME, 1, |request| request.session_key = Some(0x5e55_1044)),
        probe("an adapter", SOME, 1, |request| request.adapter = Some("adapter".to_owned())),
        probe("a retry", SOME, 1, |request| {
            request.attempt = 2;
            request.failed_workers = vec![WorkerId(1), WorkerId(2)];
        }),
        probe("a long prompt", SOME, 1, |request| request.prompt = TokenCount { tokens: 2_000_000, exact: true }),
        probe("limits and deadline", SOME, 1, |request| {
            request.max_output_tokens = Some(1);
            request.deadline_ms = Some(1);
            request.choices = 128;
        }),
    ];
    let mut explained = probe("recorded reasons", SOME, 1, plain);
    explained.call.explain = true;
    probes.push(explained);
    probes.push(probe("many candidates", 1024, 1, plain));
    probes.push(probe("very many candidates", MANY, 1, plain));
    probes
}

/// A probe over a fleet of which every `observed`th worker has been observed, 0 for none.
fn probe(name: &'static str, candidates: u32, observed: u32, change: impl FnOnce(&mut RequestFacts)) -> Probe {
    let fleet = synthetic::fleet(candidates);
    for row in (0..candidates).filter(|row| observed > 0 && row % observed == 0) {
        let load = &fleet.candidates.worker(row).load;
        load.observe(Recent::TtftMs, 20.0 + (row % 50) as f32 * 7.0);
        load.observe(Recent::ItlMs, 5.0 + (row % 10) as f32);
        load.observe(Recent::ErrorRate, (row % 20) as f32 / 40.0);
        load.observed(0);
    }
    let mut call = synthetic::route_call(&fleet, 1);
    let mut request = RequestFacts::clone(&call.request);
    change(&mut request);
    call.request = Arc::new(request);
    Probe { name, candidates, call, _fleet: fleet }
}
