//! Policies over split pools: who tells roles apart decides between them, who does not is asked in stages, and native is no worse.

use std::sync::Arc;

use dynamo_host_core::{Held, Overlap, Role, TokenCount, answer::Verdict, load::InFlight};
use dynamo_host_policy::{
    Pinned, RouteCall,
    synthetic::{self, SyntheticFleet},
};

use crate::{hostile, placed, policy, provoking, slot_of};

/// The role of who is first, over a request of 1,000 tokens.
fn first(policy: &str, settings: &str, call: RouteCall) -> Role {
    let candidates = Arc::clone(&call.candidates);
    let row = placed(&crate::policy(policy, settings), call)[0];
    candidates.worker(row).spec.role
}

/// All decode workers hold this much of the prompt.
fn held(fleet: &SyntheticFleet, tokens: u32) -> RouteCall {
    let mut call = synthetic::route_call(fleet, 1);
    let held = call.candidates.iter().filter(|worker| worker.spec.role == Role::Decode);
    let held = held.map(|worker| Held { slot: worker.load.index(), tokens: [tokens, 0, 0, 0] });
    call.overlap = Some(Arc::new(Overlap::new(held.collect())));
    call
}

#[test]
fn disagg_conditional_computes_apart_what_is_not_held_where_it_is_decoded() {
    // One prefill worker, one that decodes.
    let fleet = synthetic::split(2);
    assert!(policy("disagg-conditional", "{}").tells_roles_apart());
    assert_eq!(first("disagg-conditional", "{}", held(&fleet, 0)), Role::Prefill);
    assert_eq!(first("disagg-conditional", "{}", held(&fleet, 900)), Role::Decode);
    let by_load = r#"{"rule":"prefill_load","prefill_busy_above_tokens":0}"#;
    assert_eq!(first("disagg-conditional", by_load, held(&fleet, 0)), Role::Decode, "the prefill worker has something to do");
    let decode = fleet.candidates.iter().find(|worker| worker.spec.role == Role::Decode).unwrap();
    let _busy = InFlight::dispatch(Arc::clone(&decode.load), 10, 10, 0);
    let guarded = r#"{"decode_busy_above_tokens":9}"#;
    assert_eq!(first("disagg-conditional", guarded, held(&fleet, 900)), Role::Prefill, "the decode worker has, too");
}

#[test]
fn disagg_conditional_decides_for_many_within_its_fuel() {
    for fleet in [synthetic::split(1024), synthetic::decoding(1024), synthetic::fleet(1024)] {
        let mut call = synthetic::route_call(&fleet, 1);
        Arc::make_mut(&mut call.request).prompt = TokenCount { tokens: 100_000, exact: true };
        let rows = placed(&policy("disagg-conditional", "{}"), call);
        assert_eq!(rows.len(), 16);
    }
}

#[test]
fn a_policy_that_reads_no_links_is_asked_where_to_prefill_and_where_to_decode() {
    for name in ["kv-aware", "least-loaded", "two-tier", "power-of-two", "composed"] {
        assert_eq!(first(name, "{}", synthetic::route_call(&synthetic::prefilling(8), 1)), Role::Prefill, "{name}");
        assert_eq!(first(name, "{}", synthetic::route_call(&synthetic::decoding(8), 1)), Role::Decode, "{name}");
    }
}

#[test]
fn what_decides_instead_of_a_failed_policy_begins_no_request_where_others_are_decoded() {
    let fleet = synthetic::split(16);
    let provoked = provoking(&fleet);
    let slot = slot_of([hostile("trap")]);
    let decision = slot.decide(&slot.pin(), provoked.clone());
    assert!(decision.by.to_string().starts_with("native; fallback=trap"), "{}", decision.by);
    for verdict in [decision.verdict, slot.decide(&Pinned(None), provoked).verdict] {
        let Verdict::Place(ranking) = verdict else { panic!("{verdict:?}") };
        let roles = ranking.rows().iter().map(|&row| fleet.candidates.worker(row).spec.role);
        assert!(roles.clone().all(|role| role != Role::Decode) && roles.len() > 1);
    }
}
