//! Lines as they are written, of workers 1 to 4 with roles of choice.

use dynamo_host_core::Ranking;
use serde_json::{Value, json};

use super::*;
use crate::receipts::Line;

fn line(stage: Option<&str>, roles: [Role; 4], done: Value) -> DecisionLine {
    let line = json!({
        "v": 1, "kind": "decision", "id": "01", "request": "r", "unix_ms": 1, "now_ms": 1, "slot": "routing", "model": "m",
        "by": "policy", "policy": "p@1.0.0", "seed": "00", "candidates": 4, "workers": ["01", "02", "03", "04"],
        "facts": {
            "endpoint": "chat_completions", "prompt_tokens": 10, "exact": true, "prefix_key": "00", "choices": 1, "flags": 0,
            "accepted_ms": 0, "stage": stage,
        },
        "columns": { "role": roles.map(Role::code) }, "done": done, "names": [], "fuel": 1, "us": 1.0,
    });
    let Ok(Line::Decision(line)) = serde_json::from_value(line) else { panic!("it is a line") };
    *line
}

use Role::{Aggregated, Both, Decode, Prefill};

const SPLIT: [Role; 4] = [Prefill, Prefill, Decode, Decode];

#[test]
fn a_decision_is_put_to_a_policy_as_a_host_would() {
    let one = || json!({ "place": ["01"] });
    for (stage, roles, blind, aware) in [
        (None, SPLIT, Shown::Beginning, Shown::AsThen),
        (None, [Aggregated; 4], Shown::AsThen, Shown::AsThen),
        (None, [Decode; 4], Shown::AsThen, Shown::AsThen),
        (None, [Prefill, Prefill, Aggregated, Aggregated], Shown::AsThen, Shown::Less),
        (None, [Prefill, Both, Both, Aggregated], Shown::AsThen, Shown::AsThen),
        (Some("prefill"), [Prefill; 4], Shown::AsThen, Shown::Less),
        (Some("decode"), [Decode; 4], Shown::AsThen, Shown::AsThen),
    ] {
        let line = line(stage, roles, one());
        assert_eq!((Shown::of(&line, false), Shown::of(&line, true)), (blind, aware), "{stage:?} {roles:?}");
    }
}

#[test]
fn pairs_are_compared_as_pairs() {
    let check = |done: Value, now: &Verdict| {
        let line = line(None, SPLIT, done);
        let compared = compare(&line, &line.call().unwrap(), Ok(now), 2);
        (compared.cause, compared.in_top)
    };
    let pairs = |pairs: &[(u32, u32)]| Verdict::PlacePairs(pairs.to_vec());
    let recorded = || json!({ "place_pairs": [["01", "03"], ["02", "04"], ["02", "03"]] });
    assert_eq!(check(recorded(), &pairs(&[(0, 2)])), (None, true));
    assert_eq!(check(recorded(), &pairs(&[(0, 3), (0, 2)])), (Some("another worker to decode"), false));
    assert_eq!(check(recorded(), &pairs(&[(1, 2)])), (Some("another worker to prefill"), false));
    assert_eq!(check(recorded(), &pairs(&[(1, 3)])), (Some("other workers to prefill and to decode"), true));
    let one = Verdict::Place(Ranking::new(vec![0], 4).unwrap());
    assert_eq!(check(recorded(), &one), (Some("one worker, not prefill and decode fixed at once"), false));
    let place = || json!({ "place": ["01", "02"] });
    assert_eq!(check(place(), &pairs(&[(0, 2)])), (Some("prefill and decode fixed at once, not one worker"), false));
    assert_eq!(check(place(), &one), (None, true));
    let other = |row| Verdict::Place(Ranking::new(vec![row], 4).unwrap());
    assert_eq!(check(place(), &other(1)), (Some("another worker of the recorded ranking"), true));
    assert_eq!(check(place(), &other(2)), (Some("a worker that the recorded ranking has not"), false));
}

#[test]
fn rows_are_those_of_the_workers_that_were_shown() {
    let line = line(None, [Decode, Prefill, Prefill, Decode], json!({ "place": ["02", "03"] }));
    let call = line.of_beginning().call().unwrap();
    let first = Verdict::Place(Ranking::new(vec![0], 2).unwrap());
    assert_eq!(compare(&line, &call, Ok(&first), 1).cause, None, "row 0 of what is shown is worker 2");
}
