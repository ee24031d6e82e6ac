//! Load is counted, reported and observed, and leaves nothing behind.

use proptest::prelude::*;

use super::*;

fn loads(slot: &LoadSlot) -> [u32; 3] {
    [Load::ActiveRequests, Load::ActivePrefillTokens, Load::ActiveDecodeTokens].map(|load| slot.get(load))
}

#[test]
fn a_request_moves_from_prefill_to_decode_and_leaves_nothing() {
    let slot = LoadBoard::new(1).claim().unwrap();
    let mut request = InFlight::dispatch(Arc::clone(&slot), 100, 100, 0);
    assert_eq!(loads(&slot), [1, 100, 0]);
    request.tokens(1, 0);
    request.tokens(2, 0);
    assert_eq!(loads(&slot), [1, 0, 103]);
    drop(request);
    assert_eq!(loads(&slot), [0, 0, 0]);
}

#[test]
fn a_slot_returns_only_when_its_last_request_has_ended() {
    let board = LoadBoard::new(1);
    let slot = board.claim().unwrap();
    let request = InFlight::dispatch(Arc::clone(&slot), 5, 5, 0);
    drop(slot);
    assert!(board.claim().is_none(), "the slot is still in use");
    drop(request);
    assert!(board.claim().is_some());
}

#[test]
fn the_age_of_observations_is_known_once_there_was_one() {
    let slot = LoadBoard::new(1).claim().unwrap();
    assert_eq!(*slot.board().gather_recent_age_ms(&[0], 50), [UNKNOWN]);
    slot.observed(20);
    assert_eq!(*slot.board().gather_recent_age_ms(&[0], 50), [30]);
}

#[test]
fn what_an_engine_reports_is_known_with_its_age_and_what_it_does_not_say_is_not() {
    let board = LoadBoard::new(1);
    let slot = board.claim().unwrap();
    assert_eq!((slot.get_reported(Reported::QueuedRequests), slot.load_age_ms(50)), (None, None));
    assert_eq!(*board.gather_load_age_ms(&[0], 50), [UNKNOWN]);
    slot.report(&LoadReport { queued_requests: Some(3), kv_tokens_total: Some(UNKNOWN), ..LoadReport::default() }, 20);
    assert_eq!(*board.gather_reported(Reported::QueuedRequests, &[0]), [3]);
    assert_eq!(*board.gather_reported(Reported::KvTokensTotal, &[0]), [UNKNOWN - 1]);
    assert_eq!(*board.gather_reported(Reported::KvTokensFree, &[0]), [UNKNOWN]);
    assert_eq!((&*board.gather_load_age_ms(&[0], 50), slot.load_age_ms(50)), (&[30][..], Some(30)));
    drop(slot);
    let next = board.claim().unwrap();
    assert_eq!((next.get_reported(Reported::QueuedRequests), next.load_age_ms(50)), (None, None), "of the worker before");
}

#[test]
fn output_tokens_are_counted_whatever_becomes_of_the_request() {
    let slot = LoadBoard::new(1).claim().unwrap();
    let mut request = InFlight::dispatch(Arc::clone(&slot), 100, 100, 0);
    request.tokens(2, 0);
    request.tokens(3, 0);
    drop(request);
    assert_eq!(slot.output_tokens(), 5);
}

#[test]
fn a_recent_average_starts_at_the_first_observation() {
    let slot = LoadBoard::new(1).claim().unwrap();
    assert!(slot.board().gather_recent(Recent::TtftMs, &[0])[0].is_nan());
    slot.observe(Recent::TtftMs, 10.0);
    slot.observe(Recent::TtftMs, 20.0);
    assert_eq!(*slot.board().gather_recent(Recent::TtftMs, &[0]), [11.0]);
}

proptest! {
    #[test]
    fn any_interleaving_of_requests_drains_to_zero(steps in prop::collection::vec((0u32..2000, 0u32..50, any::<bool>()), 1..200)) {
        let slot = LoadBoard::new(1).claim().unwrap();
        let mut open: Vec<InFlight> = Vec::new();
        for (prompt, tokens, end) in steps {
            open.push(InFlight::dispatch(Arc::clone(&slot), prompt, prompt, 0));
            for request in &mut open {
                request.tokens(tokens, 0);
            }
            if end {
                open.swap_remove(0);
            }
            prop_assert_eq!(slot.get(Load::ActiveRequests) as usize, open.len());
        }
        open.clear();
        prop_assert_eq!(loads(&slot), [0, 0, 0]);
    }
}
