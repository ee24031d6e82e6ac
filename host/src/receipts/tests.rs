//! What is written is what was read, comes back as it was, and is bounded.

use dynamo_host_core::{
    Answer, Endpoint, Load, Role, Slo, Stage, Tier, UNKNOWN, Ways, Worker, WorkerId,
    answer::validate,
    column::{LinkColumn, REACHABLE, U32Column},
};
use dynamo_host_policy::{Pinned, RoutingSlot, synthetic};

use super::{line::DecisionLine, *};

/// The line of a native decision over a made-up fleet, with everything in it, by way of its text.
fn decided(fleet: &synthetic::SyntheticFleet, columns: Columns) -> (RouteCall, DecisionLine, String) {
    let mut call = synthetic::route_call(fleet, u64::MAX - 5);
    call.explain = true;
    call.now_ms = 5000;
    let mut request = RequestFacts::new("a \"request\"", "m", Endpoint::Messages);
    request.decision_id = u64::MAX - 1;
    request.tenant = Some("acme".to_owned());
    request.failed_workers = vec![WorkerId(u64::MAX)];
    request.deadline_ms = Some(9000);
    request.attempt = 1;
    (request.tier, request.class) = (2, Some("batch".into()));
    (request.generated_tokens, request.expected_output_tokens) = (7, Some(256));
    request.slo = Slo { ttft_ms: Some(500.25), itl_ms: None };
    call.request = Arc::new(request);
    let (line, text) = written(&call, columns, None);
    (call, line, text)
}

/// The line of a call by way of its text, as decided natively unless it is said how.
fn written(call: &RouteCall, columns: Columns, done: Option<(Verdict, Vec<Reading>)>) -> (DecisionLine, String) {
    let slot = RoutingSlot::new(SlotName::ROUTING);
    let mut decision = slot.decide(&Pinned(None), call.clone());
    if let Some((verdict, readings)) = done {
        (decision.verdict, decision.readings) = (verdict, readings);
    }
    let mut readings = decision.readings.clone();
    if columns == Columns::All {
        read_the_rest(call, &mut readings);
    }
    let decided = Decided {
        slot: "routing".to_owned(),
        request: Arc::clone(&call.request),
        candidates: Arc::clone(&call.candidates),
        now_ms: call.now_ms,
        unix_ms: call.unix_ms,
        seed: call.seed,
        verdict: decision.verdict,
        by: decision.by,
        explanations: vec![Explanation {
            term: "cost".to_owned(),
            values: vec![f32::INFINITY; call.candidates.count() as usize],
        }],
        readings,
        elapsed: Duration::from_micros(3),
        fuel: 7,
    };
    let text = serde_json::to_string(&Line::Decision(Box::new(DecisionLine::of(&decided)))).unwrap();
    let Ok(Line::Decision(line)) = read::parse(&text) else { panic!("{text}") };
    (*line, text)
}

#[test]
fn a_decision_is_made_again_of_its_line() {
    let fleet = synthetic::fleet(9);
    let (then, line, text) = decided(&fleet, Columns::All);
    let now = line.call().unwrap();
    for name in Candidates::column_names() {
        let read = |call: &RouteCall| format!("{:?}", call.candidates.column(name, call.now_ms, None).unwrap());
        assert_eq!(read(&now), read(&then), "{name}");
    }
    assert_eq!(now.candidates.label_column("zone"), then.candidates.label_column("zone"));
    assert_eq!(now.candidates.signal_column("price"), then.candidates.signal_column("price"));
    assert_eq!((now.seed, now.now_ms, now.unix_ms), (then.seed, then.now_ms, then.unix_ms));
    let tenant_key = then.request.tenant_key();
    let expected = RequestFacts { tenant: None, recorded_tenant_key: tenant_key, ..(*then.request).clone() };
    assert_eq!(format!("{:?}", now.request), format!("{expected:?}"));
    assert_eq!(now.request.tenant_key(), tenant_key);
    let again = RoutingSlot::new(SlotName::ROUTING).decide(&Pinned(None), now);
    let Verdict::Place(ranking) = again.verdict else { panic!("{:?}", again.verdict) };
    assert_eq!(ranking.rows().iter().map(|&row| line.workers[row as usize]).collect::<Vec<_>>(), line.placed());
    assert!(!text.contains("acme"), "a tenant is not named: {text}");
    assert!(text.contains(r#""state":0"#), "a column of one value is that value: {text}");
}

/// What a policy that tells roles apart may read of links: all that there is from one row, and from who has prefilled.
fn of_links(call: &RouteCall, row: u32) -> Vec<Reading> {
    let of = |from| {
        let ways = Ways { from, prefilled_by: call.request.prefilled_by, links: call.links.as_deref() };
        let measure = |&(name, column): &(&'static str, LinkColumn)| {
            Reading::Link(name, from, call.candidates.link_column(column, ways).into())
        };
        let reachable = Reading::Link(REACHABLE, from, call.candidates.reachable_column(ways, call.now_ms).into());
        LinkColumn::ALL.iter().map(measure).chain([reachable]).collect::<Vec<_>>()
    };
    [of(None), of(Some(row))].concat()
}

#[test]
fn a_pair_and_what_was_read_of_links_come_back_as_they_were() {
    let fleet = synthetic::split(24);
    let call = RouteCall { explain: true, ..synthetic::route_call(&fleet, 1) };
    let row = |role| call.candidates.iter().position(|worker| worker.spec.role == role).unwrap() as u32;
    let pairs = vec![(row(Role::Prefill), row(Role::Decode)), (row(Role::Prefill), row(Role::Both))];
    let readings = of_links(&call, row(Role::Prefill));
    let (line, text) = written(&call, Columns::Read, Some((Verdict::PlacePairs(pairs.clone()), readings.clone())));
    let again = line.call().unwrap();
    assert!(again.candidates.iter().map(|worker| worker.spec.role).eq(call.candidates.iter().map(|worker| worker.spec.role)));
    assert_eq!(format!("{:?}", of_links(&again, row(Role::Prefill))), format!("{readings:?}"));
    let answer = Some(Answer::PlaceDisaggregated(pairs.clone()));
    let role = |row| again.candidates.worker(row).spec.role;
    let verdict = validate(answer, again.request.stage, again.candidates.count(), role);
    assert_eq!(verdict, Ok(Verdict::PlacePairs(pairs.clone())), "the same answer is as good as it was");
    let name = |row: u32| call.candidates.worker(row).spec.name.clone();
    let (prefill, decode) = pairs[0];
    assert_eq!(line.text_of(line.choices()[0]), format!("{} + {}", name(prefill), name(decode)));
    assert!(!text.contains("\"stage\""), "all of the work is no news: {text}");
}

#[test]
fn the_stage_and_who_has_prefilled_come_back_as_they_were() {
    let fleet = synthetic::decoding(6);
    let call = RouteCall { explain: true, ..synthetic::route_call(&fleet, 1) };
    let readings = of_links(&call, 0);
    let verdict = RoutingSlot::new(SlotName::ROUTING).decide(&Pinned(None), call.clone()).verdict;
    let (line, text) = written(&call, Columns::Read, Some((verdict, readings.clone())));
    assert!(text.contains(r#""stage":"decode""#), "{text}");
    let again = line.call().unwrap();
    assert_eq!((again.request.stage, again.request.prefilled_by), (Stage::Decode, call.request.prefilled_by));
    assert_eq!(format!("{:?}", of_links(&again, 0)), format!("{readings:?}"));
}

#[test]
fn the_native_fallback_decides_again_over_roles_as_it_did() {
    let fleet = synthetic::split(16);
    let call = RouteCall { explain: true, ..synthetic::route_call(&fleet, 7) };
    let (line, _) = written(&call, Columns::Read, None);
    assert_eq!(line.columns.keys().collect::<Vec<_>>(), ["active-prefill-tokens", "active-requests", "role"]);
    let again = RoutingSlot::new(SlotName::ROUTING).decide(&Pinned(None), line.call().unwrap());
    let Verdict::Place(ranking) = again.verdict else { panic!("{:?}", again.verdict) };
    assert_eq!(ranking.rows().iter().map(|&row| line.workers[row as usize]).collect::<Vec<_>>(), line.placed());
    let roles = line.roles();
    assert!(ranking.rows().iter().all(|&row| roles[row as usize] != Role::Decode));
}

#[test]
fn who_tells_no_roles_apart_is_put_the_decision_as_it_begins() {
    let fleet = synthetic::split(16);
    let call = RouteCall { explain: true, ..synthetic::route_call(&fleet, 7) };
    let (line, _) = written(&call, Columns::All, Some((Verdict::Hold { at_most_ms: 1 }, of_links(&call, 0))));
    let begun = line.of_beginning().call().unwrap();
    let expected: Vec<&Worker> = call.candidates.iter().filter(|worker| worker.spec.role != Role::Decode).collect();
    assert!(begun.candidates.iter().map(|worker| worker.id).eq(expected.iter().map(|worker| worker.id)));
    let requests = begun.candidates.u32_column(U32Column::ActiveRequests, 0);
    assert!(requests.iter().zip(&expected).all(|(&requests, worker)| requests == worker.load.get(Load::ActiveRequests)));
    assert_eq!(begun.request.stage, Stage::Whole, "some of them serve it whole");
    let (split, _) = written(&RouteCall { explain: true, ..synthetic::route_call(&synthetic::split(4), 7) }, Columns::Read, None);
    assert_eq!(split.of_beginning().call().unwrap().request.stage, Stage::Prefill);
}

#[test]
fn a_receipt_of_many_pairs_in_a_large_fleet_keeps_them_all() {
    let fleet = synthetic::split(60_000);
    let call = RouteCall { explain: true, ..synthetic::route_call(&fleet, 1) };
    let rows = |does: fn(Role) -> bool| {
        let rows = (0..60_000).filter(|&row| does(call.candidates.worker(row).spec.role)).collect::<Vec<u32>>();
        rows.into_iter().rev().take(16).collect::<Vec<_>>()
    };
    let pairs = rows(Role::prefills).into_iter().zip(rows(|role| role == Role::Decode)).collect();
    let (line, text) = written(&call, Columns::Read, Some((Verdict::PlacePairs(pairs), of_links(&call, 0))));
    assert!(line.rows_cut > 0 && text.len() < 4 << 20, "{} rows cut, {} bytes", line.rows_cut, text.len());
    assert!(line.workers.is_sorted_by(|one, next| one < next));
    assert!(line.placed().iter().all(|worker| line.workers.contains(worker)), "what was placed on is kept");
    line.call().unwrap();
}

#[test]
fn only_what_was_read_is_written_unless_all_is_wanted() {
    let (_, line, _) = decided(&synthetic::fleet(3), Columns::Read);
    assert_eq!(line.columns.keys().collect::<Vec<_>>(), ["active-prefill-tokens", "active-requests"]);
    assert!(line.labels.is_empty());
    let unread = line.call().unwrap();
    assert_eq!(*unread.candidates.u32_column(U32Column::UpSeconds, 0), [UNKNOWN; 3]);
    assert_eq!(*unread.candidates.cached_column(Tier::Device, None), [UNKNOWN; 3]);
}

#[test]
fn a_receipt_of_a_large_fleet_is_bounded_and_says_what_it_left_out() {
    let fleet = synthetic::fleet(60_000);
    let (then, line, text) = decided(&fleet, Columns::Read);
    assert_eq!((line.candidates, line.workers.len() as u32 + line.rows_cut), (60_000, 60_000));
    assert!(line.rows_cut > 0 && text.len() < 2 << 20, "{} rows cut, {} bytes", line.rows_cut, text.len());
    assert!(line.placed().iter().all(|worker| line.workers.contains(worker)), "what was placed on is kept");
    let row = line.workers.iter().position(|worker| *worker == line.placed()[0]).unwrap();
    let slot = then.candidates.iter().position(|worker| Hex(worker.id.0) == line.placed()[0]).unwrap();
    let requests = line.call().unwrap().candidates.u32_column(U32Column::ActiveRequests, 0);
    assert_eq!(requests[row], then.candidates.u32_column(U32Column::ActiveRequests, 0)[slot]);
}

#[test]
fn what_is_no_receipt_is_said() {
    for (text, says) in [
        ("{", "it is no receipt"),
        (r#"{"kind":"decision"}"#, "missing field `v`"),
        (r#"{"v":2,"kind":"dream"}"#, "version 2; this release reads 1"),
        (r#"{"v":1,"kind":"outcome","id":"zz"}"#, "not hexadecimal"),
    ] {
        let error = read::parse(text).unwrap_err();
        assert!(error.contains(says), "{text}: {error}");
    }
    let (_, mut line, _) = decided(&synthetic::fleet(3), Columns::Read);
    line.workers.swap(0, 2);
    assert!(line.call().unwrap_err().contains("ascending order"));
}

#[test]
fn a_line_from_before_admission_is_read_as_of_a_request_that_nothing_was_said_of() {
    let (_, _, text) = decided(&synthetic::fleet(3), Columns::Read);
    let mut line: serde_json::Value = serde_json::from_str(&text).unwrap();
    let facts = line["facts"].as_object_mut().unwrap();
    for key in ["tier", "class", "generated_tokens", "expected_output_tokens", "slo_ttft_ms"] {
        assert!(facts.remove(key).is_some(), "{key} was written: {text}");
    }
    let Ok(Line::Decision(line)) = read::parse(&line.to_string()) else { panic!("{line}") };
    let request = line.call().unwrap().request;
    assert_eq!((request.tier, request.class.as_deref(), request.generated_tokens, request.slo), (0, None, 0, Slo::default()));
}

fn office(config: ReceiptsConfig, directory: &Path) -> Receipts {
    Receipts::start(&config, directory, &SlotName::ROUTING)
}

#[test]
fn a_share_of_requests_is_recorded_and_so_many_in_a_second() {
    let directory = tempfile::tempdir().unwrap();
    let half = office(ReceiptsConfig { sample: 0.25, max_per_second: 1_000_000, ..ReceiptsConfig::default() }, directory.path());
    let recorded = (0..1000).filter(|_| half.sample().is_some()).count();
    assert!((240..=260).contains(&recorded), "{recorded}");
    let none = office(ReceiptsConfig { sample: 0.0, ..ReceiptsConfig::default() }, directory.path());
    assert!((0..1000).all(|_| none.sample().is_none()));
    let few = office(ReceiptsConfig { max_per_second: 5, ..ReceiptsConfig::default() }, directory.path());
    let recorded = (0..1000).filter(|_| few.sample().is_some()).count();
    // The second may change meanwhile.
    assert!((5..=15).contains(&recorded), "{recorded}");
}

#[tokio::test]
async fn what_would_be_more_bytes_than_allowed_is_not_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let config = ReceiptsConfig { max_bytes_per_second: 1 << 10, ..ReceiptsConfig::default() };
    let receipts = office(config, directory.path());
    let mut call = synthetic::route_call(&synthetic::fleet(5000), 1);
    call.explain = true;
    let draft = receipts.sample().unwrap().draft(&call);
    draft.close(&mut RoutingSlot::new(SlotName::ROUTING).decide(&Pinned(None), call));
    receipts.flush(Duration::from_secs(20)).await;
    // Its line, of 5,000 ids, has taken the bytes of the next minute.
    assert!((0..100).all(|_| receipts.sample().is_none()));
}

#[tokio::test]
async fn what_was_left_is_on_disk_when_it_is_flushed() {
    let directory = tempfile::tempdir().unwrap();
    let receipts = office(ReceiptsConfig::default(), directory.path());
    let fleet = synthetic::fleet(4);
    let mut call = synthetic::route_call(&fleet, 1);
    call.explain = true;
    let recorder = receipts.sample().unwrap();
    let draft = recorder.draft(&call);
    draft.close(&mut RoutingSlot::new(SlotName::ROUTING).decide(&Pinned(None), call));
    receipts.flush(Duration::from_secs(20)).await;
    let mut lines = Vec::new();
    let skipped = Source::of(directory.path()).unwrap().each(|line, _| lines.push(line)).unwrap();
    assert!(matches!(&lines[..], [Line::Decision(line)] if line.by == By::Native && line.model == "synthetic"), "{lines:?}");
    assert_eq!(skipped, Skipped::default());
}

#[test]
fn a_configuration_that_cannot_be_says_which_key() {
    let refused = |config: ReceiptsConfig| config.check().unwrap_err();
    assert!(ReceiptsConfig::default().check().is_ok());
    assert!(refused(ReceiptsConfig { sample: 1.5, ..ReceiptsConfig::default() }).contains("receipts.sample is 1.5"));
    assert!(refused(ReceiptsConfig { files: 1, ..ReceiptsConfig::default() }).contains("receipts.files is 1; use 2"));
    let none = ReceiptsConfig { max_bytes_per_second: 0, ..ReceiptsConfig::default() };
    assert!(refused(none).contains("receipts.max_bytes_per_second is 0; use 1024"));
    assert!(refused(ReceiptsConfig { sample: f64::NAN, ..ReceiptsConfig::default() }).contains("receipts.sample"));
}

/// The line of an outcome, as it lies in a file.
fn line(id: u64) -> Vec<u8> {
    let outcome = format!(
        r#"{{"kind":"outcome","v":1,"id":"{id:x}","unix_ms":1,"worker":"a","name":"w","end":"done","prompt_tokens":1,"output_tokens":1,"cached_predicted":0}}"#
    );
    (outcome + "\n").into_bytes()
}

/// Whose outcome a line is.
fn id(line: Line) -> u64 {
    if let Line::Outcome(outcome) = line { outcome.id.0 } else { 0 }
}

#[test]
fn what_is_followed_is_given_once_over_a_change_of_files() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path().join(FOLDER);
    let mut log = Log::new(folder.clone(), 400, 9);
    log.append(&line(1)).unwrap();
    log.append(&line(2)).unwrap();
    let mut source = Source::of(directory.path()).unwrap();
    let mut tail = source.follow().unwrap();
    log.append(&line(3)).unwrap();
    let mut seen = Vec::new();
    source.each(|line, _| seen.push(id(line))).unwrap();
    assert_eq!(seen, [1, 2]);
    tail.look(|line, _| seen.push(id(line)));
    (4..12).for_each(|nth| log.append(&line(nth)).unwrap());
    // A file at each look.
    (0..9).for_each(|_| tail.look(|line, _| seen.push(id(line))));
    assert_eq!(seen, (1..12).collect::<Vec<u64>>());
    let files = || std::fs::read_dir(&folder).unwrap().count();
    assert!(files() > 2);
    // A line that is half written is for the next look.
    let newest = folder.join(format!("receipts-{:08}.jsonl", files()));
    let half = line(12);
    let append = |bytes: &[u8]| {
        use std::io::Write;
        std::fs::OpenOptions::new().append(true).open(&newest).unwrap().write_all(bytes).unwrap();
    };
    append(&half[..20]);
    tail.look(|_, _| panic!("it is not whole"));
    let mut source = Source::of(directory.path()).unwrap();
    let mut later = source.follow().unwrap();
    append(&half[20..]);
    let mut whole = Vec::new();
    tail.look(|line, _| whole.push(id(line)));
    later.look(|line, _| whole.push(id(line)));
    assert_eq!(whole, [12, 12]);
}

#[test]
fn what_is_followed_goes_on_where_its_file_was_removed() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path().join(FOLDER);
    // A line in each file, and two files.
    let mut log = Log::new(folder, 1, 2);
    log.append(&line(1)).unwrap();
    let mut tail = Source::of(directory.path()).unwrap().follow().unwrap();
    (2..6).for_each(|nth| log.append(&line(nth)).unwrap());
    let mut seen = Vec::new();
    (0..3).for_each(|_| {
        tail.look(|line, _| seen.push(id(line)));
    });
    assert_eq!(seen, [4, 5], "what was removed is gone, and the rest comes");
}
