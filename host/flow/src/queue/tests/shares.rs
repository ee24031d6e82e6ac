//! Shares of tenants and classes, over long runs with fixed parts.

use std::collections::{BTreeSet, HashMap};

use super::*;

/// Who comes: tier, class, its weight, tenant, its weight, work that is claimed and work that it is.
struct Source {
    class: &'static str,
    class_weight: f32,
    tenant: u64,
    weight: f32,
    claims: u32,
    is: u32,
}

const SOURCE: Source = Source { class: "", class_weight: 1.0, tenant: 1, weight: 1.0, claims: 100, is: 100 };

fn demand_of(source: &Source) -> Demand {
    let (class_weight, tenant_weight) = (source.class_weight, source.weight);
    let admitted = Admitted { class: Some(source.class.into()), class_weight, tenant_weight, ..Admitted::default() };
    Demand { admitted, work: source.claims, ..demand(source.tenant) }
}

/// Work done for each source, all of which have ten requests waiting all the time, while `slots` requests run at once.
fn serve(sources: &[Source], slots: u32, ends: usize) -> Vec<u64> {
    let mut flow = flow(10_000, u64::MAX, room(0));
    let mut owner = HashMap::new();
    for _ in 0..10 {
        sources.iter().enumerate().for_each(|(number, source)| _ = owner.insert(queued(&mut flow, demand_of(source)), number));
    }
    flow.set_room(POOL, room(slots));
    let mut done = vec![0; sources.len()];
    let mut running = std::collections::VecDeque::new();
    for _ in 0..ends {
        for action in std::iter::from_fn(|| flow.select(0).inspect(|&action| flow.apply(action, 0))).collect::<Vec<_>>() {
            let Action::Start(ticket) = action else { panic!("{action:?}") };
            running.push_back(ticket);
            let number = owner[&ticket];
            owner.insert(queued(&mut flow, demand_of(&sources[number])), number);
        }
        let ticket: Ticket = running.pop_front().unwrap();
        let number = owner.remove(&ticket).unwrap();
        flow.finish(ticket, sources[number].is, 0);
        done[number] += u64::from(sources[number].is);
    }
    flow.audit().unwrap();
    done
}

#[track_caller]
fn check_shares(sources: &[Source], slots: u32, expected: &[f64]) {
    let done = serve(sources, slots, 20_000);
    let total: u64 = done.iter().sum();
    for (done, expected) in done.iter().zip(expected) {
        let share = *done as f64 / total as f64;
        assert!((share / expected - 1.0).abs() < 0.02, "{done} of {total} is {share}, not {expected}");
    }
}

#[test]
fn tenants_share_by_weight_in_work_and_not_in_requests() {
    let tenant = |tenant, weight, is| Source { tenant, weight, is, claims: is, ..SOURCE };
    let sources = [tenant(1, 1.0, 1000), tenant(2, 2.0, 10), tenant(3, 4.0, 300)];
    check_shares(&sources, 1, &[1.0 / 7.0, 2.0 / 7.0, 4.0 / 7.0]);
    check_shares(&sources, 16, &[1.0 / 7.0, 2.0 / 7.0, 4.0 / 7.0]);
}

#[test]
fn classes_share_first_and_then_their_tenants() {
    let of = |class, class_weight, tenant, weight| Source { class, class_weight, tenant, weight, ..SOURCE };
    let sources = [of("gold", 3.0, 1, 1.0), of("gold", 3.0, 2, 2.0), of("basic", 1.0, 1, 9.0), of("basic", 1.0, 3, 1.0)];
    check_shares(&sources, 4, &[0.25, 0.5, 0.225, 0.025]);
}

#[test]
fn what_is_claimed_of_a_request_gains_nothing() {
    let claims = |tenant, claims| Source { tenant, claims, ..SOURCE };
    check_shares(&[claims(1, 1), claims(2, 100), claims(3, 2000)], 8, &[1.0 / 3.0; 3]);
}

#[test]
fn work_per_weight_differs_by_no_more_than_ones_and_the_others_largest_request() {
    let tenant = |tenant, weight, is| Source { tenant, weight, is, claims: is, ..SOURCE };
    let sources = [tenant(1, 1.0, 500), tenant(2, 2.5, 90), tenant(3, 0.5, 10)];
    for ends in [1, 7, 50, 333, 2000] {
        let done = serve(&sources, 1, ends);
        let per_weight: Vec<f64> =
            done.iter().zip(&sources).map(|(&done, source)| done as f64 / f64::from(source.weight)).collect();
        let largest: Vec<f64> = sources.iter().map(|source| f64::from(source.is) / f64::from(source.weight)).collect();
        for (one, other) in [(0, 1), (0, 2), (1, 2)] {
            let difference = (per_weight[one] - per_weight[other]).abs();
            assert!(difference <= largest[one] + largest[other], "{done:?} after {ends}");
        }
    }
}

/// Ten requests each of tenants 1 and 2; those of the second.
fn ten_of_both(flow: &mut Flow) -> Vec<Ticket> {
    (0..10).map(|_| [queued(flow, demand(1)), queued(flow, demand(2))][1]).collect()
}

/// How many of these are among the next ten.
fn among_ten(flow: &mut Flow, own: &[Ticket]) -> usize {
    flow.set_room(POOL, room(flow.running() + 10));
    drain(flow, 0).iter().filter(|action| own.iter().any(|&ticket| **action == Action::Start(ticket))).count()
}

#[test]
fn who_was_away_has_no_credit_and_no_debt() {
    // The first worked alone, waiting or not, long and with much: then they are even.
    for slots in [1, 1000] {
        let mut flow = flow(1000, u64::MAX, room(slots));
        let first: Vec<_> = (0..500).map(|_| flow.arrive(demand(1), 0).unwrap()).collect();
        flow.set_room(POOL, room(500));
        drain(&mut flow, 0);
        let own = ten_of_both(&mut flow);
        assert_eq!((first.len(), among_ten(&mut flow, &own)), (500, 5));
    }
}

#[test]
fn a_refund_for_what_was_started_before_one_came_back_is_no_credit() {
    let mut flow = flow(1000, u64::MAX, room(1));
    let claimed = started(&mut flow, Demand { work: 1_000_000, ..demand(2) });
    (0..100).for_each(|_| _ = queued(&mut flow, demand(1)));
    flow.set_room(POOL, room(101));
    drain(&mut flow, 0);
    let own = ten_of_both(&mut flow);
    flow.finish(claimed, 0, 0);
    flow.set_room(POOL, room(0));
    assert_eq!(among_ten(&mut flow, &own), 5);
}

#[test]
fn a_debt_is_paid_by_who_comes_back_while_others_wait() {
    let mut flow = flow(1000, u64::MAX, room(1));
    let claimed = started(&mut flow, Demand { work: 1, ..demand(2) });
    let mut waiting: Vec<_> = (0..10).map(|_| queued(&mut flow, demand(1))).collect();
    flow.finish(claimed, 100, 0);
    assert_eq!(drain(&mut flow, 0), [Action::Start(waiting.remove(0))]);
    let back = queued(&mut flow, demand(2));
    // 100 are five requests of the other, and at the sixth's turn it was there first.
    let order = order(&mut flow);
    assert_eq!(order.iter().position(|&ticket| ticket == back), Some(5));
}

#[test]
fn an_endless_row_of_new_tenants_does_not_keep_one_from_being_served() {
    let mut flow = flow(1000, u64::MAX, room(1));
    let mut running = started(&mut flow, demand(1));
    let own = queued(&mut flow, Demand { work: 1_000_000, ..demand(1) });
    let ends = (2..10_000).position(|tenant| {
        queued(&mut flow, demand(tenant));
        flow.finish(running, 20, 0);
        let [Action::Start(next)] = drain(&mut flow, 0)[..] else { panic!() };
        running = next;
        next == own
    });
    assert!(ends.is_some_and(|ends| ends < 200), "{ends:?}");
}

/// One who sends more than there is room for, in virtual time.
struct Sender {
    source: Source,
    tier: u32,
    /// Work that it asks for in a millisecond.
    offers: f64,
    /// When its next request comes.
    next_ms: f64,
}

/// Work done for each sender within a minute, where sixteen run at once, each a token each 10 ms, and few may wait.
fn overload(mut senders: Vec<Sender>, max_requests: u32, seed: u64) -> Vec<u64> {
    let mut flow = flow(max_requests, u64::MAX, room(16));
    let mut random = seed;
    let mut uniform = move || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as f64 / f64::from(1u32 << 31)
    };
    let mut done = vec![0; senders.len()];
    let mut ends = BTreeSet::new();
    let mut owners = HashMap::new();
    for now_ms in 0..60_000 {
        let mut started = Vec::new();
        while let Some(&(end_ms, ticket)) = ends.first()
            && end_ms <= now_ms
        {
            ends.remove(&(end_ms, ticket));
            let (number, work): (usize, u32) = owners[&ticket];
            done[number] += u64::from(work);
            flow.finish(ticket, work, now_ms);
        }
        for (number, sender) in senders.iter_mut().enumerate() {
            while sender.next_ms <= now_ms as f64 {
                let work = [16, 48, 32][(uniform() * 3.0) as usize];
                sender.next_ms += f64::from(work) / sender.offers * -uniform().max(1e-9).ln();
                let mut demand = Demand { work, deadline_ms: now_ms + 20_000, ..demand_of(&sender.source) };
                demand.admitted.tier = sender.tier;
                match flow.arrive(demand, now_ms) {
                    Ok(Arrival::Started(ticket)) => {
                        owners.insert(ticket, (number, work));
                        started.push(ticket);
                    }
                    Ok(Arrival::Queued(ticket)) => _ = owners.insert(ticket, (number, work)),
                    Err(_) => {}
                }
                assert!(flow.waiting() <= max_requests);
            }
        }
        while let Some(action) = flow.select(now_ms) {
            flow.apply(action, now_ms);
            if let Action::Start(ticket) = action {
                started.push(ticket);
            }
        }
        for ticket in started {
            flow.prefilled(ticket);
            ends.insert((now_ms + 10 * u64::from(owners[&ticket].1), ticket));
        }
    }
    flow.audit().unwrap();
    done
}

/// Two classes, high and low, of three tenants each with weights 1, 2 and 4; `offers`: of all that sixteen can do, by class.
#[track_caller]
fn check_overload(tiers: [u32; 2], weights: [f32; 2], offers: [f64; 2], max_requests: u32, of_high: f64, tenants: [f64; 2]) {
    for seed in 1..4 {
        let mut senders = Vec::new();
        for (class, name) in ["high", "low"].into_iter().enumerate() {
            for (tenant, weight) in [(1, 1.0), (2, 2.0), (3, 4.0)] {
                let source = Source { class: name, class_weight: weights[class], tenant, weight, ..SOURCE };
                senders.push(Sender { source, tier: tiers[class], offers: offers[class] * 1.6 / 3.0, next_ms: 0.0 });
            }
        }
        let done = overload(senders, max_requests, seed);
        let of = |class: usize| done[3 * class..3 * class + 3].iter().sum::<u64>() as f64;
        let near = |what: &str, share: f64, due: f64, off: f64| {
            assert!((share / due - 1.0).abs() <= off, "{what} had {share:.3}, due were {due:.3}: {done:?}, seed {seed}");
        };
        near("the high class", of(0) / (of(0) + of(1)), of_high, 0.05);
        for (class, off) in tenants.into_iter().enumerate() {
            for tenant in 0..3 {
                let share = done[3 * class + tenant] as f64 / of(class);
                near(&format!("tenant {tenant} of class {class}"), share, f64::from(1 << tenant) / 7.0, off);
            }
        }
    }
}

#[test]
fn in_overload_classes_and_their_tenants_share_by_weight_though_few_may_wait() {
    for max_requests in [150, 60] {
        check_overload([0, 0], [3.0, 1.0], [1.8, 1.2], max_requests, 0.75, [0.05, 0.05]);
    }
}

#[test]
fn in_overload_the_first_tier_has_what_it_asks_for_and_the_rest_is_shared_by_weight() {
    check_overload([0, 1], [1.0, 1.0], [0.6, 2.4], 150, 0.6, [f64::INFINITY, 0.05]);
}
