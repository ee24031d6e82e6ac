//! What policies see: every fact and column, as the host knows it, on any host that speaks their contract.

use std::{collections::BTreeSet, fs, path::Path, sync::Arc};

use dynamo_host_core::{Load, Ways, WorkerId, column::LinkColumn};
use dynamo_host_policy::{
    OutcomeRow, Pinned, PolicyVersion, RouteCall, SlotState,
    synthetic::{self, SyntheticFleet},
};

use crate::{RUNTIME, ask, component, load, policy};

/// A request of which every fact is known that this host knows.
fn witnessed_call(fleet: &SyntheticFleet) -> RouteCall {
    let mut call = synthetic::route_call(fleet, 1);
    let request = Arc::make_mut(&mut call.request);
    request.decision_id = 7;
    request.tenant = Some("acme".to_owned());
    request.session_key = Some(1);
    request.max_output_tokens = Some(64);
    request.choices = 2;
    request.flags = 5;
    request.attempt = 1;
    request.holds = 3;
    request.failed_workers = vec![WorkerId(1), WorkerId(2)];
    request.deadline_ms = Some(501);
    request.attributes.insert("x-test".to_owned(), "abc".to_owned());
    (call.now_ms, call.unix_ms, call.explain) = (101, 1000, true);
    call
}

/// What a witness that was compiled against 0.1.`patch` must say about that request over four made-up workers, on any host
/// that speaks its contract.
fn check_witness(bytes: &[u8], patch: u32) {
    const UNKNOWN: f32 = u32::MAX as f32;
    let state = Arc::new(SlotState::default());
    let version = RUNTIME.load(bytes, "{}", Arc::clone(&state)).unwrap();
    let fleet = synthetic::fleet(4);
    let routed = version.decide(witnessed_call(&fleet)).unwrap();
    let said = |term: &str| {
        let found = routed.explanations.iter().find(|explanation| explanation.term == term);
        found.unwrap_or_else(|| panic!("it said nothing of {term}")).values.clone()
    };
    #[track_caller]
    fn check(said: &[f32], expected: &[f32]) {
        let same = |(a, b): (&f32, &f32)| a == b || a.is_nan() && b.is_nan();
        assert!(said.len() == expected.len() && said.iter().zip(expected).all(same), "{said:?}\n{expected:?}");
    }
    let nan = f32::NAN;
    #[rustfmt::skip]
    check(&said("request"), &[
        7.0, 9.0, -1.0, 0.0, 0.0, 4.0, 1.0, 1.0, -1.0, 0.0, 1000.0, 0.0, 0.0, 64.0, UNKNOWN, 2.0, 5.0, 0.0, 0.0, 0.0, 0.0, -1.0,
        101.0, 400.0, nan, nan, 1.0, 3.0, 2.0, -1.0, -1.0, 0.0, 3.0,
    ]);
    check(&said("keys"), &[1.0, 4.0, 4.0, 1.0]);
    let unknown = 4.0 * UNKNOWN;
    let sum = |load| fleet.candidates.iter().map(|worker| worker.load.get(load) as f32).sum::<f32>();
    let [prefill, decode, requests] = [Load::ActivePrefillTokens, Load::ActiveDecodeTokens, Load::ActiveRequests].map(sum);
    #[rustfmt::skip]
    check(&said("u32"), &[
        0.0, 0.0, 0.0, 64.0, unknown, unknown, unknown, unknown, prefill, decode, requests, unknown, unknown, unknown, unknown,
        unknown, unknown, unknown, 0.0, unknown,
    ]);
    if patch >= 1 {
        // Nothing of the made-up prompts is cached, and all but the first, which is empty, wait since the clock's start.
        check(&said("added"), &[prefill, 3.0 * 101.0]);
    }
    if patch >= 3 {
        // Nobody hands KV over: it can go nowhere, and nothing is known of it.
        check(&said("links"), &[[-1.0].as_slice(), &[0.0; 16]].concat());
        check_links(&version);
    } else {
        assert!(!version.tells_roles_apart());
    }
    check(&said("f32"), &[nan, nan, nan, nan, 4.0]);
    check(&said("named"), &[2.0, 2.0, 0.0, 6.0, -1.0]);
    check(&said("services"), &[1.0, 5.0, 2.0, 1.0, 101.0, 1000.0, 1.0]);
    let row = |tokens| OutcomeRow {
        decision_id: 7,
        worker_id: 2,
        ttft_ms: 3.0,
        itl_ms: nan,
        queue_ms: nan,
        output_tokens: tokens,
        end: 0,
    };
    version.observe([row(1), row(2)].into()).unwrap();
    version.observe(Vec::new().into()).unwrap();
    assert!(version.observes());
}

/// What it must say of links over split pools: sums of what [`synthetic`] makes up.
fn check_links(version: &PolicyVersion) {
    assert!(version.tells_roles_apart());
    let said = |fleet: &SyntheticFleet| {
        let routed = ask(version, &RouteCall { explain: true, ..synthetic::route_call(fleet, 1) }).unwrap();
        routed.explanations.iter().find(|explanation| explanation.term == "links").unwrap().values.clone()
    };
    let expected = |fleet: &SyntheticFleet| {
        let call = synthetic::route_call(fleet, 1);
        let known = call.request.prefilled_by.map_or(-1.0, |_| 1.0);
        let of = |from| {
            let ways = Ways { from, prefilled_by: call.request.prefilled_by, links: call.links.as_deref() };
            let reachable = call.candidates.reachable_column(ways, call.now_ms).iter().sum::<u32>() as f32;
            let sum = |(_, column): &(&str, LinkColumn)| -> f32 {
                call.candidates.link_column(*column, ways).iter().filter(|value| !value.is_nan()).sum()
            };
            [vec![reachable], LinkColumn::ALL.iter().map(sum).collect()].concat()
        };
        [vec![known], [None, Some(0), Some(1), Some(99)].into_iter().flat_map(of).collect()].concat()
    };
    for fleet in [synthetic::split(24), synthetic::decoding(12)] {
        let said = said(&fleet);
        assert_eq!(said, expected(&fleet));
        assert!(said[1..].iter().any(|&value| value > 0.0), "there was something to see: {said:?}");
    }
}

#[test]
fn who_reads_links_tells_roles_apart_and_nobody_else_does() {
    for name in ["least-loaded", "kv-aware", "round-robin"] {
        assert!(!policy(name, "{}").tells_roles_apart(), "{name} reads no links");
    }
    assert!(!Pinned(None).tells_roles_apart(), "nor does the native fallback");
    assert!(Pinned(Some(load(&component("guests", "witness"), "{}").unwrap())).tells_roles_apart());
}

#[test]
fn a_policy_sees_every_fact_and_column_as_the_host_knows_it() {
    check_witness(&component("guests", "witness"), u32::MAX);
}

#[test]
fn every_fossil_still_sees_what_it_saw_when_it_was_released() {
    let fossils = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fossils");
    let mut found = BTreeSet::new();
    for release in fs::read_dir(fossils).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        let name = release.file_name().unwrap().to_str().unwrap();
        let patch = name.rsplit_once('.').and_then(|(minor, patch)| patch.parse().ok().filter(|_| minor == "0.1")).unwrap();
        let fossils = fs::read_dir(&release).unwrap().map(|entry| entry.unwrap().path());
        for fossil in fossils {
            let bytes = fs::read(&fossil).unwrap();
            match fossil.file_name().and_then(|name| name.to_str()) {
                Some("witness.wasm") => check_witness(&bytes, patch),
                Some("witness-admission.wasm") => crate::admission::check_witness(&bytes),
                other => panic!("{other:?} is no fossil that is known"),
            }
            found.insert(release.file_name().unwrap().to_owned());
        }
    }
    // A folder of the contract for each release of a world, and a guest that was compiled against it.
    let released = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../wit/released")).unwrap();
    let released: BTreeSet<_> = released.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(found, released, "there is a fossil for each release");
}
