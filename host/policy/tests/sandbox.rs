//! Real components in the real sandbox: good policies decide, bad ones are refused or bounded under their own name.
//!
//! The components are what `cargo xtask policies` builds.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use dynamo_host_core::{Load, SlotName, WorkerId, answer::Verdict};
use dynamo_host_policy::{
    DecidedBy, FaultCause, Limits, LoadError, Now, OutcomeRow, PolicyRuntime, PolicyVersion, RouteCall, RoutingSlot, SlotState,
    synthetic::{self, SyntheticFleet},
};

static RUNTIME: LazyLock<PolicyRuntime> = LazyLock::new(|| runtime(Limits::default(), None));

fn runtime(limits: Limits, cache: Option<&Path>) -> PolicyRuntime {
    let start = Instant::now();
    let clock = move || Now { monotonic_ms: start.elapsed().as_millis() as u64, unix_ms: 1 };
    PolicyRuntime::new(limits, Arc::new(clock), cache).unwrap()
}

/// Waits until something holds that other threads bring about.
#[track_caller]
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn component(kind: &str, name: &str) -> Vec<u8> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let path: PathBuf = [target, Path::new(kind), Path::new(&format!("{name}.wasm"))].iter().collect();
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}; run: cargo xtask policies", path.display()))
}

fn load(bytes: &[u8], settings: &str) -> Result<Arc<PolicyVersion>, LoadError> {
    RUNTIME.load(bytes, settings, Arc::new(SlotState::default()))
}

#[track_caller]
fn policy(name: &str, settings: &str) -> Arc<PolicyVersion> {
    load(&component("policies", name), settings).unwrap()
}

#[track_caller]
fn hostile(mode: &str) -> Arc<PolicyVersion> {
    load(&component("guests", "hostile"), &format!(r#"{{"mode":"{mode}"}}"#)).unwrap()
}

/// A request that hostile guests misbehave at.
fn provoking(fleet: &SyntheticFleet) -> RouteCall {
    let mut call = synthetic::route_call(fleet, 1);
    Arc::make_mut(&mut call.request).max_output_tokens = Some(13);
    call
}

fn placed(version: &PolicyVersion, call: RouteCall) -> Vec<u32> {
    match version.route(call).unwrap().verdict {
        Verdict::Place(ranking) => ranking.rows().to_vec(),
        other => panic!("not placed: {other:?}"),
    }
}

#[test]
fn round_robin_takes_turns_across_instances() {
    let fleet = synthetic::fleet(5);
    let version = policy("round-robin", "{}");
    let mut hits = [0; 5];
    for seed in 0..50 {
        hits[placed(&version, synthetic::route_call(&fleet, seed))[0] as usize] += 1;
    }
    assert_eq!(hits, [10; 5]);
}

#[test]
fn least_loaded_ranks_an_idle_worker_first_and_obeys_its_settings() {
    let fleet = synthetic::fleet(4);
    let version = policy("least-loaded", "{}");
    let first = placed(&version, synthetic::route_call(&fleet, 1))[0];
    let idle = (0..4).min_by_key(|&row| fleet.candidates.worker(row).load.get(dynamo_host_core::Load::ActiveRequests)).unwrap();
    assert_eq!(first, idle);
    assert_eq!(version.name().to_string(), format!("least-loaded@{}", env!("CARGO_PKG_VERSION")));
    assert!(version.settings_schema().unwrap().contains("prefill_token"));
}

#[test]
fn a_decision_depends_on_its_seed_alone() {
    let fleet = synthetic::fleet(100);
    let (one, other) = (policy("least-loaded", "{}"), policy("least-loaded", "{}"));
    for seed in 0..20 {
        let call = synthetic::route_call(&fleet, seed);
        assert_eq!(placed(&one, call.clone()), placed(&other, call));
    }
}

#[test]
fn each_misbehaviour_has_its_own_cause_and_the_next_call_works() {
    let fleet = synthetic::fleet(8);
    for (mode, cause) in [
        ("trap", FaultCause::Trap),
        ("loop", FaultCause::Fuel),
        ("memory", FaultCause::Memory),
        ("recursion", FaultCause::Stack),
        ("bulk", FaultCause::Fuel),
        ("host-calls", FaultCause::Fuel),
        ("out-of-range", FaultCause::Answer("answer-out-of-range")),
        ("duplicate", FaultCause::Answer("answer-duplicate")),
        ("empty", FaultCause::Answer("answer-empty")),
        ("too-many", FaultCause::Answer("answer-too-many")),
        ("no-answer", FaultCause::Answer("no-answer")),
        ("bad-status", FaultCause::Answer("answer-status")),
    ] {
        let version = hostile(mode);
        let fault = version.route(provoking(&fleet)).unwrap_err();
        assert_eq!(fault.cause, cause, "{mode}: {fault}");
        let good = synthetic::route_call(&fleet, 1);
        assert_eq!(placed(&version, good).len(), 8, "after {mode}");
    }
}

#[test]
fn a_panic_is_shown_in_the_guests_words() {
    let fault = hostile("trap").route(provoking(&synthetic::fleet(2))).unwrap_err();
    assert!(fault.detail.contains("configured to panic"), "{fault}");
}

#[test]
fn a_flood_of_telemetry_is_cut_and_the_decision_stands() {
    assert_eq!(placed(&hostile("flood"), provoking(&synthetic::fleet(2))).len(), 2);
}

#[test]
fn failed_instances_are_replaced_off_the_request_path() {
    let version = hostile("trap");
    let fleet = synthetic::fleet(2);
    let mut causes = Vec::new();
    for _ in 0..200 {
        causes.push(version.route(provoking(&fleet)).unwrap_err().cause);
    }
    assert!(causes.iter().all(|cause| matches!(cause, FaultCause::Trap | FaultCause::Busy)), "{causes:?}");
    eventually("it decides again", || version.route(synthetic::route_call(&fleet, 1)).is_ok());
}

#[test]
fn more_instances_than_a_host_may_have_are_refused_not_waited_for() {
    let runtime = runtime(Limits { instances: 1, ..Limits::default() }, None);
    let bytes = component("policies", "round-robin");
    let mut loaded = Vec::new();
    let error = (0..64).find_map(|_| match runtime.load(&bytes, "{}", Arc::default()) {
        Ok(version) => {
            loaded.push(version);
            None
        }
        Err(error) => Some(error),
    });
    let error = error.expect("the bound on instances is reached");
    assert_eq!(error.cause(), "start");
    assert!(error.to_string().contains("instances that this host may have are in use"), "{error}");
    assert!(loaded.len() >= 4, "four versions fit, and {} did", loaded.len());
}

#[test]
fn versions_that_were_replaced_let_go_of_their_instances() {
    let runtime = runtime(Limits { instances: 1, ..Limits::default() }, None);
    let slot = RoutingSlot::new(SlotName::ROUTING);
    let bytes = component("policies", "round-robin");
    for _ in 0..30 {
        slot.activate(Some(runtime.load(&bytes, "{}", Arc::clone(slot.state())).unwrap()));
        // The active one has two for each core, the one before it one.
        eventually("replaced versions let go", || runtime.instance_count() <= 3 * cores());
    }
    slot.prepare_rollback().unwrap();
    slot.rollback().unwrap();
    let decision = slot.decide(&slot.pin(), synthetic::route_call(&synthetic::fleet(2), 1));
    assert!(matches!(decision.by, DecidedBy::Policy(_)));
}

fn cores() -> u32 {
    std::thread::available_parallelism().unwrap().get() as u32
}

#[test]
fn a_probe_leaves_no_trace_in_the_slots_state() {
    let state = Arc::new(SlotState::default());
    let fleet = synthetic::fleet(64);
    let first = |version: &PolicyVersion| placed(version, synthetic::route_call(&fleet, 1))[0];
    let bytes = component("policies", "round-robin");
    let one = RUNTIME.load(&bytes, "{}", Arc::clone(&state)).unwrap();
    let turn = first(&one);
    let other = RUNTIME.load(&bytes, "{}", Arc::clone(&state)).unwrap();
    assert_eq!(first(&other), turn + 1, "the probe's turns are its own");
}

#[track_caller]
fn refused(bytes: &[u8], settings: &str, cause: &str, says: &[&str]) {
    let error = load(bytes, settings).expect_err("it should be refused");
    assert_eq!(error.cause(), cause, "{error}");
    let text = error.to_string();
    for part in says {
        assert!(text.contains(part), "{text:?} should say {part:?}");
    }
}

#[test]
fn what_is_not_a_policy_is_refused_with_the_way_out() {
    let good = component("policies", "round-robin");
    refused(b"", "{}", "empty", &["build the policy again"]);
    refused(b"#!/bin/sh\n", "{}", "not-wasm", &["not WebAssembly"]);
    refused(&wat::parse_str("(module)").unwrap(), "{}", "core-module", &["wasm-tools component new"]);
    refused(&good[..good.len() / 2], "{}", "malformed", &["build or copy it again"]);
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle..middle + 64].fill(0xff);
    assert!(load(&flipped, "{}").is_err());
    refused(&vec![0; 17 << 20], "{}", "too-large", &["16777216"]);
}

/// A component of that text, with the section that names it.
fn named(text: &str) -> Vec<u8> {
    let section = r#"(@custom "dynamo:policy" "name: x\nversion: 1.0.0\n")"#;
    wat::parse_str(text.replacen("(component", &format!("(component {section}"), 1)).unwrap()
}

#[test]
fn the_wrong_world_is_refused_at_load() {
    refused(&wat::parse_str("(component)").unwrap(), "{}", "description", &["dynamo:policy", "register!"]);
    refused(&named("(component)"), "{}", "wrong-world", &["exports: nothing"]);
    let exporting = |name: &str| named(&format!(r#"(component (instance $i) (export "{name}" (instance $i)))"#));
    refused(&exporting("dynamo:policy/admitting@0.1.0"), "{}", "wrong-world", &["admission"]);
    refused(&exporting("dynamo:policy/routing@7.0.0"), "{}", "contract-version", &["7.0.0", "rebuild it"]);
    refused(&exporting("dynamo:policy/routing@0.1.0"), "{}", "missing-export", &["lifecycle"]);
}

#[test]
fn an_import_from_outside_of_the_contract_is_refused_at_load() {
    let text = r#"(component
        (import "wasi:filesystem/types@0.2.0" (instance))
        (instance $i)
        (export "dynamo:policy/routing@0.1.0" (instance $i))
        (export "dynamo:policy/lifecycle@0.1.0" (instance $i)))"#;
    refused(&named(text), "{}", "forbidden-import", &["wasi:filesystem/types@0.2.0", "allowed: dynamo:policy/", "without WASI"]);
}

#[test]
fn settings_are_checked_before_a_policy_is_active() {
    let bytes = component("policies", "least-loaded");
    refused(&bytes, "{", "settings-syntax", &["JSON object"]);
    refused(&bytes, "[]", "settings-syntax", &["JSON object"]);
    refused(&bytes, r#"{"prefil_token": 1}"#, "settings", &["prefil_token", "prefill_token"]);
    refused(
        &bytes,
        r#"{"request": -1}"#,
        "settings",
        &["request is -1", "it accepts decode_token (number), prefill_token (number)"],
    );
    refused(
        &component("guests", "hostile"),
        r#"{"mode":"trap-in-configure"}"#,
        "start",
        &["trap", "configured to panic in configure"],
    );
    refused(&component("guests", "hostile"), r#"{"mode":"trap-always"}"#, "probe", &["1 candidates", "configured to panic"]);
}

#[test]
fn what_a_policy_reads_can_be_told_from_its_bytes() {
    let imports = policy("round-robin", "{}").inspection().imports.clone();
    assert!(imports.iter().any(|import| import.contains("/state@")), "{imports:?}");
    assert!(!imports.iter().any(|import| import.contains("/outcomes@")), "{imports:?}");
    assert!(!policy("round-robin", "{}").observes());
}

#[test]
fn outcomes_reach_a_policy_that_has_nothing_to_learn_without_harm() {
    let row = OutcomeRow { decision_id: 1, worker_id: 2, ttft_ms: 3.0, itl_ms: f32::NAN, output_tokens: 1, end: 0 };
    policy("least-loaded", "{}").observe([row].into()).unwrap();
}

#[test]
fn a_slot_falls_back_rolls_back_and_keeps_what_requests_pinned() {
    let fleet = synthetic::fleet(4);
    let slot = RoutingSlot::new(SlotName::ROUTING);
    let by = |pinned: &_, call| match slot.decide(pinned, call).by {
        DecidedBy::Policy(version) => version.label().to_string(),
        DecidedBy::Native(cause) => format!("native {}", cause.map_or("by choice", FaultCause::as_str)),
    };
    let good = || synthetic::route_call(&fleet, 1);
    assert_eq!(by(&slot.pin(), good()), "native by choice");

    slot.activate(Some(policy("round-robin", "{}")));
    let pinned = slot.pin();
    slot.activate(Some(hostile("trap")));
    assert_eq!(by(&pinned, good()), "round-robin@0.1.0", "a request keeps its version");
    let bad = slot.pin();
    assert_eq!(by(&bad, good()), "hostile@0.1.0");
    assert_eq!(by(&bad, provoking(&fleet)), "native trap");

    slot.prepare_rollback().unwrap();
    slot.rollback().unwrap();
    assert_eq!(by(&slot.pin(), good()), "round-robin@0.1.0");
    assert_eq!(by(&bad, good()), "native revoked", "what was found bad decides nothing more");
    slot.rollback().unwrap();
    assert_eq!(by(&slot.pin(), good()), "native by choice");
    assert!(slot.rollback().unwrap_err().to_string().contains("policy activate routing"));
}

#[test]
fn a_report_says_what_happened() {
    let fleet = synthetic::fleet(4);
    let slot = RoutingSlot::new(SlotName::ROUTING);
    slot.activate(Some(hostile("out-of-range")));
    for _ in 0..3 {
        let _ = slot.decide(&slot.pin(), provoking(&fleet));
    }
    let report = slot.report();
    assert_eq!(report.active.policy, "hostile@0.1.0");
    assert_eq!(report.active.fallbacks["answer-out-of-range"], 3);
    assert!(report.active.last_fault.unwrap().contains("row 4"));
    assert_eq!(report.previous[0].policy, "native");
}

#[test]
fn the_compilation_cache_is_for_this_user_alone() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("cache");
    let runtime = runtime(Limits::default(), Some(&cache));
    runtime.load(&component("policies", "round-robin"), "{}", Arc::default()).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&cache).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
}

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

/// What a witness must say about that request over four made-up workers, on any host that speaks its contract.
fn check_witness(bytes: &[u8]) {
    const UNKNOWN: f32 = u32::MAX as f32;
    let state = Arc::new(SlotState::default());
    let version = RUNTIME.load(bytes, "{}", Arc::clone(&state)).unwrap();
    let fleet = synthetic::fleet(4);
    let routed = version.route(witnessed_call(&fleet)).unwrap();
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
    check(&said("f32"), &[nan, nan, nan, nan, 4.0]);
    check(&said("named"), &[2.0, 2.0, 0.0, 6.0, -1.0]);
    check(&said("services"), &[1.0, 5.0, 2.0, 1.0, 101.0, 1000.0, 1.0]);
    let row = |tokens| OutcomeRow { decision_id: 7, worker_id: 2, ttft_ms: 3.0, itl_ms: nan, output_tokens: tokens, end: 0 };
    version.observe([row(1), row(2)].into()).unwrap();
    version.observe(Vec::new().into()).unwrap();
    assert!(version.observes());
}

#[test]
fn a_policy_sees_every_fact_and_column_as_the_host_knows_it() {
    check_witness(&component("guests", "witness"));
}

#[test]
fn every_fossil_still_sees_what_it_saw_when_it_was_released() {
    let fossils = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fossils");
    let mut found = 0;
    for release in fs::read_dir(fossils).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        check_witness(&fs::read(release.join("witness.wasm")).unwrap());
        found += 1;
    }
    assert!(found > 0, "there is a fossil for each release");
}
