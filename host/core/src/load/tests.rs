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

#[test]
fn what_the_engine_says_of_a_prompt_puts_the_books_right() {
    let slot = LoadBoard::new(1).claim().unwrap();
    let uncached = |slot: &LoadSlot| slot.get(Load::ActiveUncachedTokens);
    let mut request = InFlight::dispatch(Arc::clone(&slot), 100, 60, 0);
    request.correct(150, None);
    assert_eq!((loads(&slot), uncached(&slot)), ([1, 150, 0], 110), "the forty that were believed to be cached still are");
    request.correct(150, Some(128));
    assert_eq!(uncached(&slot), 22);
    request.tokens(1, 0);
    request.tokens(4, 0);
    request.correct(90, Some(0));
    assert_eq!((loads(&slot), uncached(&slot)), ([1, 0, 95], 0), "the real prompt, and the output so far");
    drop(request);
    assert_eq!((loads(&slot), uncached(&slot)), ([0, 0, 0], 0));
}

#[test]
fn a_prompt_of_no_tokens_ends_its_prefill_all_the_same() {
    let slot = LoadBoard::new(1).claim().unwrap();
    let mut request = InFlight::dispatch(Arc::clone(&slot), 100, 100, 0);
    request.correct(0, None);
    request.tokens(1, 7);
    assert_eq!(loads(&slot), [1, 0, 1]);
    assert_eq!(*slot.board().gather_prefill_busy_ms(&[0], 100), [0]);
}

/// What may happen on a worker in one moment of the day.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Dispatch {
        prompt: u32,
        cached: u32,
    },
    Tokens {
        which: usize,
        count: u32,
    },
    Correct {
        which: usize,
        prompt: u32,
        cached: Option<u32>,
    },
    /// It ends, by whatever way.
    End {
        which: usize,
    },
}

fn happening() -> impl Strategy<Value = Happening> {
    // Now and then an amount that no column can hold beside another.
    let amount = || prop_oneof![8 => 0..200_000u32, 1 => Just(0), 1 => (UNKNOWN - 10)..=UNKNOWN];
    let which = 0..64usize;
    prop_oneof![
        3 => (amount(), amount()).prop_map(|(prompt, cached)| Happening::Dispatch { prompt, cached }),
        4 => (which.clone(), 0..64u32).prop_map(|(which, count)| Happening::Tokens { which, count }),
        2 => (which.clone(), amount(), proptest::option::of(amount()))
            .prop_map(|(which, prompt, cached)| Happening::Correct { which, prompt, cached }),
        3 => which.prop_map(|which| Happening::End { which }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Hours of churn: thousands of requests that begin, grow, are corrected and end, a second apart.
    #[test]
    fn nothing_drifts_over_hours_of_churn(day in proptest::collection::vec(happening(), 1..4000)) {
        let slot = LoadBoard::new(1).claim().unwrap();
        let mut running: Vec<InFlight> = Vec::new();
        for (second, happening) in (0u64..).zip(day) {
            match happening {
                Happening::Dispatch { prompt, cached } => {
                    running.push(InFlight::dispatch(Arc::clone(&slot), prompt, prompt.saturating_sub(cached), second * 1000));
                }
                _ if running.is_empty() => {}
                Happening::Tokens { which, count } => {
                    let at = which % running.len();
                    running[at].tokens(count, second * 1000);
                }
                Happening::Correct { which, prompt, cached } => {
                    let at = which % running.len();
                    running[at].correct(prompt, cached);
                }
                Happening::End { which } => drop(running.swap_remove(which % running.len())),
            }
            // The columns are the sum of what the running ones hold, at every moment.
            let held = |of: fn(&InFlight) -> u32| running.iter().map(|one| u64::from(of(one))).sum::<u64>();
            prop_assert_eq!(u64::from(slot.get(Load::ActivePrefillTokens)), held(|one| one.prefill));
            prop_assert_eq!(u64::from(slot.get(Load::ActiveUncachedTokens)), held(|one| one.uncached));
            prop_assert_eq!(u64::from(slot.get(Load::ActiveDecodeTokens)), held(|one| one.decode));
            prop_assert_eq!(slot.get(Load::ActiveRequests) as usize, running.len());
        }
        running.clear();
        prop_assert_eq!(loads(&slot), [0, 0, 0]);
        prop_assert_eq!(slot.get(Load::ActiveUncachedTokens), 0);
    }
}
