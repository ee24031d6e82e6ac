use proptest::prelude::*;

use super::*;

fn policy(settings: Settings) -> SessionAffinity {
    SessionAffinity::new(settings).unwrap()
}

/// Workers with these ids and so much work in prompt tokens each.
fn fleet(ids: &[u64], prefill: &[u32]) -> Candidates {
    let zeros = vec![0; ids.len()];
    Candidates::test(ids.len() as u32)
        .with_worker_id(ids)
        .with_active_prefill_tokens(prefill)
        .with_active_decode_tokens(zeros.clone())
        .with_active_requests(zeros)
}

fn idle(ids: &[u64]) -> Candidates {
    fleet(ids, &vec![0; ids.len()])
}

fn rows(policy: &SessionAffinity, request: &Request, candidates: &Candidates) -> Vec<u32> {
    match policy.route(request, candidates) {
        Decision::Place(rows) => rows,
        other => panic!("not placed: {other:?}"),
    }
}

/// The workers in the order of a session's ranking.
fn workers(session: u64, candidates: &Candidates) -> Vec<u64> {
    let request = Request::test().with_session_key(session).with_prompt_tokens(100);
    let rows = rows(&policy(Settings::default()), &request, candidates);
    rows.into_iter().map(|row| candidates.worker_id()[row as usize]).collect()
}

const IDS: [u64; 5] = [11, 22, 33, 44, 55];

#[test]
fn a_session_has_one_worker_whatever_its_prompt() {
    let candidates = idle(&IDS);
    let policy = policy(Settings::default());
    let first = rows(&policy, &Request::test().with_session_key(1).with_prefix_key(5), &candidates);
    for prefix in 0..50 {
        let request = Request::test().with_session_key(1).with_prefix_key(prefix);
        assert_eq!(rows(&policy, &request, &candidates), first);
    }
}

#[test]
fn without_a_session_prompts_that_begin_alike_stay_together() {
    let candidates = idle(&IDS);
    let policy = policy(Settings::default());
    let of = |prefix| rows(&policy, &Request::test().with_prefix_key(prefix), &candidates);
    assert_eq!(of(7), of(7));
    assert!((0..20).any(|prefix| of(prefix)[0] != of(7)[0]));
}

#[test]
fn the_setting_says_what_belongs_together() {
    let candidates = idle(&IDS);
    let by = |key| policy(Settings { key, ..Settings::default() });
    let request = |session, prefix| Request::test().with_session_key(session).with_prefix_key(prefix);
    for session in 0..20 {
        assert_eq!(
            rows(&by(Key::Prefix), &request(session, 3), &candidates),
            rows(&by(Key::Prefix), &request(0, 3), &candidates)
        );
    }
    // Without a key of that kind, the least work.
    let busy = fleet(&IDS, &[9, 9, 9, 0, 9]);
    for prefix in 0..20 {
        assert_eq!(rows(&by(Key::Session), &Request::test().with_prefix_key(prefix), &busy)[0], 3);
    }
}

#[test]
fn a_worker_over_the_bound_is_passed_over_for_the_next_choice() {
    let preferred = workers(1, &idle(&IDS));
    let home = IDS.iter().position(|id| *id == preferred[0]).unwrap();
    let mut prefill = [4000; 5];
    prefill[home] = 4900;
    assert_eq!(workers(1, &fleet(&IDS, &prefill)), preferred, "below a quarter more than the mean");
    prefill[home] = 9000;
    let spilled = workers(1, &fleet(&IDS, &prefill));
    assert_eq!(spilled[..4], preferred[1..], "the others in the key's order");
    assert_eq!(spilled[4], preferred[0], "and it is the last resort");
}

#[test]
fn a_nearly_idle_fleet_is_not_balanced() {
    let preferred = workers(1, &idle(&IDS));
    let home = IDS.iter().position(|id| *id == preferred[0]).unwrap();
    let mut prefill = [0; 5];
    prefill[home] = 2000;
    assert_eq!(workers(1, &fleet(&IDS, &prefill)), preferred);
}

#[test]
fn a_hot_key_spills_and_no_worker_is_far_above_the_mean() {
    let ids: Vec<u64> = (1..=20).map(|id| id * 7919).collect();
    let mut prefill = vec![0u32; 20];
    let (new, placed) = (500, 400);
    for _ in 0..placed {
        let request = Request::test().with_session_key(1).with_prompt_tokens(new);
        let row = rows(&policy(Settings::default()), &request, &fleet(&ids, &prefill))[0];
        prefill[row as usize] += new;
    }
    let mean = f64::from(new * placed) / 20.0;
    let fullest = f64::from(*prefill.iter().max().unwrap());
    assert!(fullest <= 1.25 * mean + f64::from(new), "{fullest} with a mean of {mean}");
    assert!(prefill.iter().filter(|&&work| work > 0).count() > 10);
}

#[test]
fn of_whom_nothing_is_known_is_not_passed_over_and_does_not_move_the_mean() {
    let unknown = fleet(&IDS, &[UNKNOWN, 4000, 4000, 4000, 4000]);
    assert_eq!(workers(1, &unknown), workers(1, &idle(&IDS)));
}

#[test]
fn keys_are_spread_evenly() {
    let candidates = idle(&(0..10).map(|id| id * 104_729).collect::<Vec<_>>());
    let mut hits = [0; 10];
    for session in 0..10_000u64 {
        let request = Request::test().with_session_key(session);
        hits[rows(&policy(Settings::default()), &request, &candidates)[0] as usize] += 1;
    }
    assert!(hits.iter().all(|hits| (850..1150).contains(hits)), "{hits:?}");
}

#[test]
fn a_negative_slack_is_refused_by_name() {
    let error = SessionAffinity::new(Settings { slack: -0.5, ..Settings::default() }).err().unwrap();
    assert_eq!(error, "slack is -0.5; use a number of at least 0");
}

fn ids() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::btree_set(any::<u64>(), 2..40).prop_map(|ids| ids.into_iter().collect())
}

proptest! {
    /// When a worker leaves, only its own keys move, each to its next choice; and back when it returns.
    #[test]
    fn only_the_keys_of_workers_that_come_or_go_move(ids in ids(), gone in any::<prop::sample::Index>(), session in any::<u64>()) {
        let gone = *gone.get(&ids);
        let rest: Vec<u64> = ids.iter().copied().filter(|id| *id != gone).collect();
        let before = workers(session, &idle(&ids));
        let after = workers(session, &idle(&rest));
        if before[0] == gone {
            prop_assert_eq!(after[0], before[1]);
        } else {
            prop_assert_eq!(after[0], before[0]);
        }
    }

    /// Whatever the loads, whoever is chosen first is within the bound.
    #[test]
    fn the_first_choice_is_within_the_bound(prefill in prop::collection::vec(0u32..200_000, 1..40), session in any::<u64>()) {
        let ids: Vec<u64> = (1..=prefill.len() as u64).collect();
        let candidates = fleet(&ids, &prefill);
        let request = Request::test().with_session_key(session).with_prompt_tokens(100);
        let policy = policy(Settings::default());
        let first = rows(&policy, &request, &candidates)[0] as usize;
        prop_assert!(prefill[first] as f32 <= policy.bound(&work(&candidates), 164.0));
    }
}
