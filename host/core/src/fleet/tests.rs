//! Who is a candidate, and what the columns say.

use super::*;
use crate::{
    column::LinkColumn,
    links::LinkBoard,
    load::{InFlight, LoadReport},
    worker::{Handoff, WorkerSpec, WorkerState},
};

fn worker(board: &Arc<LoadBoard>, name: &str, state: WorkerState, labels: &[(&str, &str)]) -> Worker {
    let spec = WorkerSpec {
        name: name.to_owned(),
        model: "m".to_owned(),
        role: Role::Aggregated,
        rank: 0,
        block_size: None,
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
    };
    let load = board.claim().unwrap();
    Worker {
        id: spec.id("t"),
        spec: Arc::new(spec),
        state,
        adapters: Arc::default(),
        handoff: Handoff::default(),
        joined_ms: 0,
        load,
    }
}

fn fleet_of(names: &[&str]) -> (Fleet, Arc<LoadBoard>) {
    let board = LoadBoard::new(16);
    let workers = names.iter().map(|name| worker(&board, name, WorkerState::Healthy, &[])).collect();
    (Fleet::new(1, workers).unwrap(), board)
}

#[test]
fn rows_are_in_ascending_id_and_load_follows_its_worker() {
    let (fleet, _board) = fleet_of(&["a", "b", "c", "d"]);
    let candidates = fleet.candidates("m", Among::Whole).unwrap();
    assert!(candidates.u64_column(U64Column::WorkerId).is_sorted());
    for row in 0..candidates.count() {
        let _busy = InFlight::dispatch(Arc::clone(&candidates.worker(row).load), 7, 7, 0);
        let column = candidates.u32_column(U32Column::ActivePrefillTokens, 0);
        let expected: Vec<u32> = (0..4).map(|r| if r == row { 7 } else { 0 }).collect();
        assert_eq!(*column, *expected);
    }
}

#[test]
fn only_workers_that_are_well_or_suspect_of_the_model_and_role_are_candidates() {
    let board = LoadBoard::new(16);
    let states = WorkerState::ALL;
    let workers = states.iter().enumerate().map(|(i, state)| worker(&board, &i.to_string(), *state, &[])).collect();
    let fleet = Fleet::new(1, workers).unwrap();
    let candidates = fleet.candidates("m", Among::Whole).unwrap();
    let mut codes = candidates.u32_column(U32Column::State, 0).to_vec();
    codes.sort_unstable();
    assert_eq!(codes, [0, 1], "one that is healthy and one that is suspect");
    assert!(fleet.candidates("m", Among::Decoders).is_none());
    assert!(fleet.candidates("other", Among::Whole).is_none());
    assert!(fleet.models().contains("m"));
}

#[test]
fn an_adapters_candidates_are_the_workers_that_have_it_loaded() {
    let board = LoadBoard::new(16);
    let with = |name: &str, adapters: &[&str]| Worker {
        adapters: adapters.iter().map(|&adapter| adapter.to_owned()).collect(),
        ..worker(&board, name, WorkerState::Healthy, &[])
    };
    let fleet = Fleet::new(1, vec![with("a", &["sql"]), with("b", &[]), with("c", &["sql", "law"])]).unwrap();
    let names = |candidates: Arc<Candidates>| candidates.iter().map(|w| w.spec.name.clone()).collect::<BTreeSet<_>>();
    let sql = fleet.candidates_with("m", "sql", Among::Whole).unwrap();
    assert_eq!(*sql.u32_column(U32Column::AdapterLoaded, 0), [1, 1]);
    let rest = sql.without(&[sql.worker(0).id]).unwrap();
    assert_eq!(*rest.u32_column(U32Column::AdapterLoaded, 0), [1]);
    assert_eq!(names(sql), BTreeSet::from(["a".to_owned(), "c".to_owned()]));
    assert_eq!(fleet.candidates_with("m", "law", Among::Whole).unwrap().count(), 1);
    assert!(fleet.candidates_with("m", "poems", Among::Whole).is_none());
    let all = fleet.candidates("m", Among::Whole).unwrap();
    assert_eq!((all.count(), all.u32_column(U32Column::AdapterLoaded, 0)[0]), (3, UNKNOWN));
}

#[test]
fn what_engines_report_is_in_the_columns_and_a_configured_block_size_wins() {
    let board = LoadBoard::new(4);
    let mut workers: Vec<Worker> = ["a", "b", "c"].iter().map(|name| worker(&board, name, WorkerState::Healthy, &[])).collect();
    Arc::make_mut(&mut workers[0].spec).block_size = Some(64);
    let report = LoadReport { queued_requests: Some(2), block_size: Some(16), ..LoadReport::default() };
    workers[0].load.report(&report, 5);
    workers[1].load.report(&report, 7);
    let fleet = Fleet::new(1, workers).unwrap();
    let candidates = fleet.candidates("m", Among::Whole).unwrap();
    for (row, worker) in candidates.iter().enumerate() {
        let expected = match worker.spec.name.as_str() {
            "a" => (2, 5, 64),
            "b" => (2, 3, 16),
            _ => (UNKNOWN, UNKNOWN, UNKNOWN),
        };
        let at = |column| candidates.u32_column(column, 10)[row];
        let found = (at(U32Column::QueuedRequests), at(U32Column::LoadAgeMs), at(U32Column::BlockSize));
        assert_eq!(found, expected, "{}", worker.spec.name);
    }
}

#[test]
fn excluded_workers_are_gone_and_nothing_left_is_none() {
    let (fleet, _board) = fleet_of(&["a", "b", "c"]);
    let all = fleet.candidates("m", Among::Whole).unwrap();
    let ids: Vec<WorkerId> = all.iter().map(|worker| worker.id).collect();
    let rest = all.without(&ids[..1]).unwrap();
    assert_eq!(rest.iter().map(|worker| worker.id).collect::<Vec<_>>(), ids[1..]);
    assert!(all.without(&ids).is_none());
}

#[test]
fn a_duplicate_worker_is_named() {
    let board = LoadBoard::new(2);
    let twins = vec![worker(&board, "a", WorkerState::Healthy, &[]), worker(&board, "a", WorkerState::Starting, &[])];
    let error = Fleet::new(1, twins).unwrap_err().to_string();
    assert!(error.contains("\"a\"") && error.contains("twice"), "{error}");
}

#[test]
fn labels_become_codes_and_numbers_become_signals() {
    let board = LoadBoard::new(4);
    let workers = vec![
        worker(&board, "a", WorkerState::Healthy, &[("gpu", "h200"), ("price", "2.5")]),
        worker(&board, "b", WorkerState::Healthy, &[("gpu", "h100"), ("price", "x")]),
        worker(&board, "c", WorkerState::Healthy, &[]),
    ];
    let fleet = Fleet::new(1, workers).unwrap();
    let candidates = fleet.candidates("m", Among::Whole).unwrap();
    let codes = candidates.label_column("gpu");
    for (row, worker) in (0..).zip(candidates.iter()) {
        let expected = worker.spec.labels.get("gpu").map_or(UNKNOWN, |value| candidates.label_code("gpu", value).unwrap());
        assert_eq!(codes[row as usize], expected);
    }
    assert_eq!(candidates.label_code("gpu", "b300"), None);
    let price = candidates.signal_column("price").unwrap();
    assert_eq!(price.iter().filter(|value| **value == 2.5).count(), 1);
    assert_eq!(price.iter().filter(|value| value.is_nan()).count(), 2);
    assert!(candidates.signal_column("gpu").is_none());
}

/// Names of the candidates of each part, as `name name`, of workers `name:role:group` or `name:role:group:only`, where the last serves
/// no whole requests.
fn parts(workers: &[&str]) -> [String; 4] {
    let fleet = split(workers);
    [Among::Whole, Among::Beginning, Among::Everyone, Among::Decoders].map(|among| {
        let Some(candidates) = fleet.candidates("m", among) else { return String::new() };
        let mut names: Vec<String> = candidates.iter().map(|worker| worker.spec.name.clone()).collect();
        names.sort();
        names.join(" ")
    })
}

fn split(workers: &[&str]) -> Fleet {
    let board = LoadBoard::new(16);
    let workers = workers.iter().map(|text| {
        let mut parts = text.split(':');
        let mut made = worker(&board, parts.next().unwrap(), WorkerState::Healthy, &[]);
        Arc::make_mut(&mut made.spec).role = parts.next().unwrap().parse().unwrap();
        made.handoff.group = parts.next().and_then(|group| group.parse().ok());
        made.handoff.serves_whole = parts.next().is_none();
        made
    });
    Fleet::new(1, workers.collect()).unwrap()
}

#[test]
fn who_is_a_candidate_depends_on_the_part_of_the_work() {
    assert_eq!(parts(&["a:aggregated", "b:aggregated"]), ["a b", "a b", "a b", ""]);
    assert_eq!(parts(&["p:prefill:1", "d:decode:1"]), ["d", "p", "d p", "d"]);
    assert_eq!(parts(&["a:aggregated", "p:prefill:1", "d:decode:1"]), ["a", "a p", "a d p", "d"]);
    assert_eq!(parts(&["b:both:1", "c:both:1"]), ["b c", "b c", "b c", "b c"]);
    assert_eq!(parts(&["p:prefill:1:only", "d:decode:1:only"]), ["", "p", "d p", "d"]);
}

#[test]
fn where_nobody_can_hand_over_requests_are_served_whole() {
    assert_eq!(parts(&["p:prefill:1"]), ["p", "p", "p", ""]);
    assert_eq!(parts(&["d:decode:1"]), ["d", "d", "d", "d"]);
    assert_eq!(parts(&["p:prefill:1", "d:decode:2"]), ["d", "d", "d", "d"]);
    assert_eq!(parts(&["p:prefill", "d:decode"]), ["d", "d", "d", "d"]);
    assert_eq!(parts(&["b:both:1"]), ["b", "b", "b", "b"]);
    assert_eq!(parts(&["p:prefill:1:only"]), ["", "", "", ""]);
}

#[test]
fn whoever_serves_whole_requests_is_there_for_one_that_the_usual_have_failed() {
    for (workers, names) in [
        (&["p:prefill", "d:decode"][..], &["d", "p"][..]),
        (&["p:prefill:1", "d:decode:1", "a:aggregated"], &["a", "d", "p"]),
        (&["p:prefill:1:only", "d:decode:1"], &["d"]),
        (&["a:aggregated", "b:aggregated"], &["a", "b"]),
    ] {
        let candidates = split(workers).candidates("m", Among::AnyWhole).unwrap();
        let mut found: Vec<&str> = candidates.iter().map(|worker| worker.spec.name.as_str()).collect();
        found.sort_unstable();
        assert_eq!(found, names);
    }
}

#[test]
fn columns_of_links_are_of_the_ways_from_one_worker_to_each_candidate() {
    let fleet = split(&["p:prefill:1", "d:decode:1", "e:decode:1", "f:decode:2", "b:both:1", "a:aggregated:1"]);
    let everyone = fleet.candidates("m", Among::Everyone).unwrap();
    let row = |name: &str| everyone.iter().position(|worker| worker.spec.name == name).unwrap() as u32;
    let slot = |name: &str| everyone.worker(row(name)).load.index();
    let links = LinkBoard::default();
    links.arrived(slot("p"), slot("d"), 1000, 10.0);
    (0..crate::links::FAILURES).for_each(|_| links.failed(slot("p"), slot("e"), 100));
    let from = |name: &str| Ways { from: Some(row(name)), prefilled_by: None, links: Some(&links) };
    let reached = |among: &Candidates, ways| {
        let column = among.reachable_column(ways, 200);
        let mut names: Vec<&str> =
            among.iter().zip(column.iter()).filter(|(_, value)| **value == 1).map(|(to, _)| to.spec.name.as_str()).collect();
        names.sort_unstable();
        names.join(" ")
    };
    assert_eq!(reached(&everyone, from("p")), "b d", "e is avoided for now, f does it otherwise, a does not decode for others");
    assert_eq!(reached(&everyone, from("b")), "d e", "a link that fails is avoided, others of the same worker are not");
    assert_eq!(reached(&everyone, from("d")), "");
    assert_eq!(reached(&everyone, Ways { from: Some(99), ..from("p") }), "", "there is no such row");
    let rates = everyone.link_column(LinkColumn::TokensPerSecond, from("p"));
    let known: Vec<usize> = (0..6).filter(|&row| !rates[row].is_nan()).collect();
    assert_eq!((known, rates[row("d") as usize]), (vec![row("d") as usize], 100_000.0));

    let decoders = fleet.candidates("m", Among::Decoders).unwrap();
    let done = Ways { from: None, prefilled_by: Some(everyone.worker(row("p")).id), links: Some(&links) };
    assert_eq!(reached(&decoders, done), "b d", "who has prefilled need not be a candidate");
    assert_eq!(reached(&decoders, Ways { prefilled_by: None, ..done }), "");
}
