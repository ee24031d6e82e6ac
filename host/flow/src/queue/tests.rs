//! What the queue does, step by step; and, in `random`, what holds whatever happens.

mod random;
mod shares;

use dynamo_host_core::Admitted;

use super::*;

const POOL: u64 = 7;

fn flow(max_requests: u32, max_tokens: u64, room: Room) -> Flow {
    let mut flow = Flow::new(Bounds { max_requests, max_tokens });
    flow.set_room(POOL, room);
    flow
}

/// Room for so many requests.
fn room(requests: u32) -> Room {
    Room { workers: 1, requests: Some(requests), tokens: None }
}

fn demand(tenant: u64) -> Demand {
    let admitted = Admitted::default();
    Demand { pool: POOL, tenant, admitted, prompt_tokens: 10, work: 20, deadline_ms: u64::MAX }
}

#[track_caller]
fn queued(flow: &mut Flow, demand: Demand) -> Ticket {
    match flow.arrive(demand, 0) {
        Ok(Arrival::Queued(ticket)) => ticket,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn started(flow: &mut Flow, demand: Demand) -> Ticket {
    match flow.arrive(demand, 0) {
        Ok(Arrival::Started(ticket)) => ticket,
        other => panic!("{other:?}"),
    }
}

/// Everything that is to be done now, done.
fn drain(flow: &mut Flow, now_ms: u64) -> Vec<Action> {
    let mut actions = Vec::new();
    while let Some(action) = flow.select(now_ms) {
        flow.apply(action, now_ms);
        actions.push(action);
    }
    flow.audit().unwrap();
    actions
}

/// Makes room for all, and tells the order in which they start.
fn order(flow: &mut Flow) -> Vec<Ticket> {
    let start = |action| match action {
        Action::Start(ticket) => ticket,
        other => panic!("{other:?}"),
    };
    flow.set_room(POOL, room(u32::MAX));
    drain(flow, 0).into_iter().map(start).collect()
}

#[test]
fn a_request_that_finds_room_runs_at_once_and_the_next_when_it_ends() {
    let mut flow = flow(10, 1000, room(1));
    let first = started(&mut flow, demand(1));
    let second = queued(&mut flow, demand(2));
    assert_eq!(flow.select(5), None);
    flow.finish(first, 20, 5);
    assert_eq!(drain(&mut flow, 5), [Action::Start(second)]);
    flow.finish(second, 20, 9);
    flow.finish(second, 20, 9);
    assert_eq!((flow.waiting(), flow.waiting_tokens(), flow.running()), (0, 0, 0));
    flow.audit().unwrap();
}

#[test]
fn tiers_are_strict_and_within_a_tenant_priority_goes_before_deadline_before_arrival() {
    let mut flow = flow(20, 1000, room(0));
    let mut come = |tier, priority, deadline_ms| {
        let admitted = Admitted { tier, priority, ..Admitted::default() };
        queued(&mut flow, Demand { admitted, deadline_ms, ..demand(1) })
    };
    let expected = [(3, 0.0, 50), (1, -1.0, 10), (1, 0.0, 90), (1, 0.0, 90), (1, 0.0, 40), (1, 2.5, u64::MAX), (0, f32::NAN, 99)];
    let tickets = expected.map(|(tier, priority, deadline_ms)| come(tier, priority, deadline_ms));
    assert_eq!(order(&mut flow), [6, 5, 4, 2, 3, 1, 0].map(|at: usize| tickets[at]));
}

#[test]
fn one_pools_head_blocks_no_other_pool() {
    let mut flow = flow(10, 1000, room(0));
    flow.set_room(8, room(1));
    let waiting = queued(&mut flow, demand(1));
    let running = started(&mut flow, Demand { pool: 8, ..demand(1) });
    let behind = queued(&mut flow, Demand { pool: 8, ..demand(1) });
    flow.finish(running, 20, 1);
    assert_eq!(drain(&mut flow, 1), [Action::Start(behind)]);
    assert_eq!(order(&mut flow), [waiting]);
}

#[test]
fn a_prompt_larger_than_the_room_in_tokens_waits_for_the_others_prefill_and_nobody_passes_it() {
    let mut flow = flow(10, 10_000, Room { workers: 1, requests: None, tokens: Some(100) });
    let first = started(&mut flow, Demand { prompt_tokens: 60, ..demand(1) });
    let large = queued(&mut flow, Demand { prompt_tokens: 5000, ..demand(2) });
    let small = queued(&mut flow, demand(3));
    assert_eq!(flow.select(0), None);
    flow.prefilled(first);
    assert_eq!(drain(&mut flow, 0), [Action::Start(large)]);
    flow.prefilled(large);
    flow.prefilled(large);
    assert_eq!(drain(&mut flow, 0), [Action::Start(small)]);
}

#[test]
fn deadlines_end_the_wait_the_earlier_of_two_and_one_that_is_over_is_refused() {
    let mut flow = flow(10, 1000, room(0));
    let within = |ms| Admitted { deadline_ms: Some(ms), ..Admitted::default() };
    let late = queued(&mut flow, Demand { deadline_ms: 70, ..demand(1) });
    let early = queued(&mut flow, Demand { admitted: within(30), deadline_ms: 70, ..demand(1) });
    assert_eq!(flow.wake_at(), Some(30));
    assert_eq!((drain(&mut flow, 29), drain(&mut flow, 30)), (vec![], vec![Action::Expire(early)]));
    assert_eq!(drain(&mut flow, 1000), [Action::Expire(late)]);
    assert_eq!(flow.arrive(Demand { deadline_ms: 5, ..demand(1) }, 5), Err(Refusal::Late));
    assert_eq!(flow.arrive(Demand { admitted: within(0), ..demand(1) }, 5), Err(Refusal::Late));
    assert_eq!(flow.wake_at(), None);
}

#[test]
fn who_leaves_is_gone_at_once_waiting_running_or_displaced() {
    let mut flow = flow(1, 1000, room(1));
    let running = started(&mut flow, demand(1));
    let displaced = queued(&mut flow, Demand { admitted: Admitted { tier: 1, ..Admitted::default() }, ..demand(1) });
    let waiting = queued(&mut flow, demand(1));
    assert_eq!(flow.select(0), Some(Action::Refuse(displaced)));
    for ticket in [displaced, waiting, running] {
        flow.finish(ticket, 0, 1);
        flow.audit().unwrap();
    }
    assert_eq!((flow.select(1), flow.waiting(), flow.running()), (None, 0, 0));
}

#[test]
fn a_full_queue_takes_what_has_a_better_claim_and_tells_who_yields() {
    let mut flow = flow(4, 1000, room(0));
    let of_tier = |tier| Admitted { tier, ..Admitted::default() };
    let tickets = [1, 1, 1, 2].map(|tenant| queued(&mut flow, demand(tenant)));
    // A tenant with less than the one that has most of it; its latest yields. Then they are even.
    let third = queued(&mut flow, demand(3));
    assert_eq!(drain(&mut flow, 0), [Action::Refuse(tickets[2])]);
    assert_eq!(flow.arrive(demand(2), 0), Err(Refusal::Requests { max: 4 }));
    // By weight: with a weight of 4 it may have as much as four of the others.
    let heavy = Admitted { tenant_weight: 4.0, ..Admitted::default() };
    queued(&mut flow, Demand { admitted: heavy, ..demand(2) });
    assert_eq!(drain(&mut flow, 0), [Action::Refuse(tickets[1])]);
    // The own tenant's later ones yield to a sooner one.
    let sooner = Admitted { priority: 1.0, ..Admitted::default() };
    let sooner = queued(&mut flow, Demand { admitted: sooner, ..demand(3) });
    assert_eq!(drain(&mut flow, 0), [Action::Refuse(third)]);
    // Later tiers are refused, earlier ones displace whoever has most.
    assert_eq!(flow.arrive(Demand { admitted: of_tier(1), ..demand(9) }, 0), Err(Refusal::Requests { max: 4 }));
    flow.finish(sooner, 0, 0);
    let later = queued(&mut flow, Demand { admitted: of_tier(1), ..demand(9) });
    queued(&mut flow, demand(1));
    assert_eq!(drain(&mut flow, 0), [Action::Refuse(later)]);
    assert_eq!(flow.waiting(), 4);
}

#[test]
fn room_for_a_long_prompt_is_made_of_several_short_ones_or_of_none() {
    let mut flow = flow(200, 1000, room(0));
    for tenant in [1, 2] {
        (0..50).for_each(|_| _ = queued(&mut flow, demand(tenant)));
    }
    let long = |tier, prompt_tokens| {
        let admitted = Admitted { tier, ..Admitted::default() };
        Demand { prompt_tokens, admitted, ..demand(3) }
    };
    // Nobody has as much of the queue as it would.
    assert_eq!(flow.arrive(long(0, 600), 0), Err(Refusal::Tokens { max: 1000 }));
    assert_eq!((flow.waiting(), flow.select(0)), (100, None));
    queued(&mut flow, long(0, 50));
    assert_eq!((drain(&mut flow, 0).len(), flow.waiting_tokens()), (5, 1000));
    let late = flow.arrive(long(1, 10), 0);
    assert_eq!(late, Err(Refusal::Tokens { max: 1000 }));
    // No queue takes what is larger than itself.
    assert_eq!(flow.arrive(long(0, 1001), 0), Err(Refusal::Tokens { max: 1000 }));
}

#[test]
fn room_for_a_long_prompt_is_made_by_a_class_or_pool_of_many_who_have_little_each() {
    let of = |class: &str| Admitted { class: Some(class.into()), ..Admitted::default() };
    for (pool, class) in [(POOL, "other"), (8, "many")] {
        let mut flow = flow(200, 1000, room(0));
        (0..100).for_each(|tenant| _ = queued(&mut flow, Demand { admitted: of("many"), ..demand(tenant) }));
        let long = |prompt_tokens| Demand { pool, admitted: of(class), prompt_tokens, ..demand(1000) };
        queued(&mut flow, long(300));
        assert_eq!((drain(&mut flow, 0).len(), flow.waiting_tokens()), (30, 1000));
        // As much again would be more than the others then had.
        assert_eq!(flow.arrive(long(300), 0), Err(Refusal::Tokens { max: 1000 }));
        assert_eq!(flow.waiting(), 71);
    }
}

#[test]
fn a_prompt_that_no_queue_could_take_is_refused_whatever_the_bounds() {
    for (max_requests, max_tokens) in [(1, 1), (1, 0), (u32::MAX, u64::MAX)] {
        let mut flow = flow(max_requests, max_tokens, room(0));
        let _ = flow.arrive(Demand { prompt_tokens: 1, ..demand(1) }, 0);
        let arrived = flow.arrive(Demand { prompt_tokens: u32::MAX, work: u32::MAX, ..demand(2) }, 0);
        assert_eq!(arrived.is_ok(), max_tokens == u64::MAX);
        flow.audit().unwrap();
    }
}

#[test]
fn two_that_displace_each_other_come_to_an_end() {
    let mut flow = flow(9, 1000, room(0));
    (0..9).for_each(|_| _ = queued(&mut flow, Demand { prompt_tokens: 7, ..demand(1) }));
    let mut displaced = 0;
    for turn in 0..100 {
        let _ = flow.arrive(Demand { prompt_tokens: 1 + turn as u32 % 97, ..demand(1 + turn % 2) }, 0);
        let actions = drain(&mut flow, 0).len();
        displaced += actions;
        assert!(turn < 50 || actions == 0, "{actions} displaced at turn {turn}");
    }
    assert!((1..=9).contains(&displaced), "{displaced}");
}

#[test]
fn one_pools_flood_leaves_the_queue_to_others() {
    let mut flow = flow(100, 10_000, room(0));
    (0..1000).for_each(|tenant| _ = flow.arrive(demand(tenant), 0));
    drain(&mut flow, 0);
    for _ in 0..50 {
        queued(&mut flow, Demand { pool: 8, ..demand(1) });
    }
    assert_eq!(drain(&mut flow, 0).len(), 50);
    assert_eq!(flow.arrive(Demand { pool: 8, ..demand(1) }, 0), Err(Refusal::Requests { max: 100 }));
    assert_eq!((flow.pool(POOL, 0).queued, flow.pool(8, 0).queued), (50, 50));
}

#[test]
fn a_queue_without_places_refuses_what_cannot_run_at_once() {
    let mut flow = flow(0, 1000, room(1));
    started(&mut flow, demand(1));
    assert_eq!(flow.arrive(demand(1), 0), Err(Refusal::Requests { max: 0 }));
    assert_eq!(flow.arrive(Demand { pool: 99, ..demand(1) }, 0), Err(Refusal::Requests { max: 0 }));
    flow.audit().unwrap();
}

#[test]
fn a_pools_load_says_what_runs_waits_and_fits() {
    let mut flow = flow(10, 1000, room(2));
    assert_eq!(flow.pool(POOL, 0), PoolLoad { free: Some(2), ..PoolLoad::default() });
    started(&mut flow, demand(1));
    started(&mut flow, demand(1));
    flow.arrive(demand(1), 100).unwrap();
    flow.arrive(demand(1), 300).unwrap();
    let load = flow.pool(POOL, 500);
    assert_eq!((load.running, load.free, load.queued, load.queued_tokens, load.oldest_age_ms), (2, Some(0), 2, 20, 400));
    assert!(load.predicted_wait_ms.is_nan());
    let unknown = flow.pool(99, 0);
    assert_eq!((unknown.free, unknown.queued), (Some(0), 0));
    // Without workers nothing is free; with room without bounds, nothing limits it.
    flow.set_room(8, Room { workers: 1, ..Room::default() });
    assert_eq!(flow.pool(8, 0).free, None);
    flow.set_room(8, Room::default());
    assert_eq!(flow.pool(8, 0).free, Some(0));
}

#[test]
fn the_predicted_wait_is_by_the_pace_of_what_ended_and_by_what_comes_before() {
    let mut flow = flow(1000, 100_000, room(2));
    // Two at once, each 20 of work in 100 ms: 0.4 a millisecond.
    let mut running: Vec<Ticket> = (0..2).map(|_| started(&mut flow, demand(1))).collect();
    (0..20).for_each(|_| _ = queued(&mut flow, demand(1)));
    for now_ms in (100..=500).step_by(100) {
        running.drain(..).for_each(|ticket| flow.finish(ticket, 20, now_ms));
        let starts = drain(&mut flow, now_ms);
        running.extend(starts.iter().map(|action| if let Action::Start(ticket) = action { *ticket } else { panic!() }));
    }
    // Ten wait, and a place is to get free for them.
    assert_eq!(flow.pool(POOL, 500).predicted_wait_ms, (10.0 * 20.0 + 20.0) / 0.4);
    let standing = |tenant, tier, tenant_weight| {
        let admitted = Admitted { tier, tenant_weight, ..Admitted::default() };
        flow.predicted_wait_ms(POOL, tenant, &admitted)
    };
    // A newcomer waits for a place only, a tenant with others waiting for those, a later tier for all.
    assert_eq!([standing(2, 0, 1.0), standing(1, 0, 1.0), standing(2, 3, 1.0)], [50.0, 550.0, 550.0]);
    assert!(flow.predicted_wait_ms(99, 1, &Admitted::default()).is_nan());
}

#[test]
fn what_was_there_is_forgotten() {
    let mut flow = flow(10, 10_000, room(1));
    for tenant in 0..10_000 {
        let admitted =
            Admitted { class: Some(format!("class-{}", tenant % 999).into()), tier: tenant as u32 % 5, ..Admitted::default() };
        let ticket = started(&mut flow, Demand { admitted, ..demand(tenant) });
        flow.finish(ticket, 5000, 1);
        assert!(flow.shares.len() <= 2, "{}", flow.shares.len());
    }
    // While somebody is there all the time, those that come and go once are no more than are remembered.
    let mut last = started(&mut flow, demand(0));
    for tenant in 0..10_000 {
        flow.set_room(POOL, room(2));
        let next = started(&mut flow, demand(tenant));
        flow.finish(last, 20, 1);
        last = next;
        assert!(flow.shares.len() <= 4 + 66, "{}", flow.shares.len());
    }
    flow.finish(last, 20, 1);
    flow.set_room(POOL, Room::default());
    assert_eq!((flow.shares.len(), flow.pool_places.len()), (0, 0));
    flow.audit().unwrap();
}
