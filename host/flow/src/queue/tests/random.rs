//! What holds whatever happens: random events against a naive model that looks at everything.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Event {
    Arrive {
        pool: u64,
        class: u8,
        tenant: u64,
        tier: u32,
        priority: i8,
        prompt_tokens: u32,
        output: u32,
        patience_ms: u64,
    },
    /// One that runs, waits or has ended ends.
    Finish {
        nth: usize,
        work: u32,
    },
    Prefilled {
        nth: usize,
    },
    Room {
        pool: u64,
        room: Room,
    },
    Bounds(Bounds),
    /// Time goes by.
    Pass {
        ms: u64,
    },
    /// The host does what there is to do, as it does after each event; not always at once.
    Act,
}

fn event() -> impl Strategy<Value = Event> {
    let arrive = (0..2u64, 0..3u8, 0..4u64, 0..3u32, -1..2i8, prop_oneof![1..50u32, 1..600u32], 0..300u32, 0..400u64);
    let arrive = arrive.prop_map(|(pool, class, tenant, tier, priority, prompt_tokens, output, patience_ms)| Event::Arrive {
        pool,
        class,
        tenant,
        tier,
        priority,
        prompt_tokens,
        output,
        patience_ms,
    });
    let room = (0..2u64, 0..3u32, proptest::option::of(0..6u32), proptest::option::of(0..500u32));
    let room = room.prop_map(|(pool, workers, requests, tokens)| Event::Room { pool, room: Room { workers, requests, tokens } });
    let bounds = (0..12u32, 0..2000u64).prop_map(|(max_requests, max_tokens)| Event::Bounds(Bounds { max_requests, max_tokens }));
    prop_oneof![
        12 => arrive,
        6 => (any::<usize>(), 0..1000u32).prop_map(|(nth, work)| Event::Finish { nth, work }),
        4 => any::<usize>().prop_map(|nth| Event::Prefilled { nth }),
        2 => room,
        1 => bounds,
        2 => (0..100u64).prop_map(|ms| Event::Pass { ms }),
        12 => Just(Event::Act),
    ]
}

/// One that waits or runs, as the model has it.
#[derive(Clone, Debug)]
struct Known {
    demand: Demand,
    prefilling: bool,
}

#[derive(Default)]
struct Model {
    now_ms: u64,
    arrived: usize,
    waiting: HashMap<Ticket, Known>,
    displaced: HashMap<Ticket, Known>,
    running: HashMap<Ticket, Known>,
    /// Every ticket that there was.
    tickets: Vec<Ticket>,
    rooms: HashMap<u64, Room>,
    refused: usize,
    expired: usize,
    left: usize,
    finished: usize,
}

impl Model {
    fn arrive(&mut self, flow: &mut Flow, demand: Demand) {
        self.arrived += 1;
        let known = Known { demand: demand.clone(), prefilling: true };
        let waited_for = self.of_pool(demand.pool).count() > 0;
        match flow.arrive(demand.clone(), self.now_ms) {
            Ok(Arrival::Started(ticket)) => {
                assert!(!waited_for, "it passed others");
                self.start(ticket, known);
                self.tickets.push(ticket);
            }
            Ok(Arrival::Queued(ticket)) => {
                assert!(waited_for || !self.fits(&demand), "it waits for nothing");
                assert!(!self.tickets.contains(&ticket), "a ticket was given twice");
                self.waiting.insert(ticket, known);
                self.tickets.push(ticket);
                self.displace(flow, ticket, &demand);
            }
            Err(Refusal::Late) => {
                assert!(demand.deadline_ms <= self.now_ms);
                self.refused += 1;
            }
            Err(Refusal::Requests { max }) => {
                assert!(self.waiting.len() >= max as usize);
                assert!(
                    max == 0 || !self.has_later(demand.admitted.tier) || self.waiting.len() > max as usize,
                    "a later tier waits"
                );
                self.refused += 1;
            }
            Err(Refusal::Tokens { max }) => {
                assert!(self.tokens() + u64::from(demand.prompt_tokens) > max);
                self.refused += 1;
            }
        }
    }

    /// Whose place an arrival has taken.
    fn displace(&mut self, flow: &Flow, arrival: Ticket, demand: &Demand) {
        let gone: Vec<Ticket> = flow.displaced.iter().copied().filter(|ticket| !self.displaced.contains_key(ticket)).collect();
        for ticket in gone {
            let known = self.waiting.remove(&ticket).expect("only those that wait are displaced");
            assert!(ticket != arrival && known.demand.admitted.tier >= demand.admitted.tier, "a better claim yielded");
            self.displaced.insert(ticket, known);
        }
        assert!(self.waiting.len() <= flow.bounds.max_requests as usize && self.tokens() <= flow.bounds.max_tokens);
    }

    fn start(&mut self, ticket: Ticket, known: Known) {
        assert!(self.fits(&known.demand), "there was no room");
        self.running.insert(ticket, known);
    }

    fn act(&mut self, flow: &mut Flow) {
        while let Some(action) = flow.select(self.now_ms) {
            flow.apply(action, self.now_ms);
            match action {
                Action::Refuse(ticket) => {
                    self.displaced.remove(&ticket).expect("who is refused was displaced");
                    self.refused += 1;
                }
                Action::Expire(ticket) => {
                    let known = self.waiting.remove(&ticket).expect("who expires waited");
                    assert!(known.demand.deadline_ms <= self.now_ms);
                    self.expired += 1;
                }
                Action::Start(ticket) => {
                    let known = self.waiting.remove(&ticket).expect("who starts waited");
                    assert!(known.demand.deadline_ms > self.now_ms);
                    self.check_order(ticket, &known.demand);
                    self.start(ticket, known);
                }
            }
            self.check(flow);
        }
        assert!(self.waiting.values().all(|known| known.demand.deadline_ms > self.now_ms) && self.displaced.is_empty());
        // Whatever is next in a pool with room for anything would have started.
        for (&pool, room) in &self.rooms {
            let (running, prefill_tokens) = self.runs(pool);
            let is_free = room.workers > 0 && room.requests.is_none_or(|max| running < max) && prefill_tokens == 0;
            assert!(!is_free || self.of_pool(pool).count() == 0, "somebody waits for nothing");
        }
    }

    /// Nobody of the pool was in an earlier tier, nobody of the tenant was sooner.
    fn check_order(&self, ticket: Ticket, demand: &Demand) {
        let rank = |demand: &Demand, ticket: Ticket| (-demand.admitted.priority as i64, demand.deadline_ms, ticket);
        for (&other, known) in self.waiting.iter().filter(|(_, known)| known.demand.pool == demand.pool) {
            let (one, admitted) = (&known.demand, &known.demand.admitted);
            assert!(admitted.tier >= demand.admitted.tier, "an earlier tier waits");
            let is_own =
                (one.tenant, &admitted.class, admitted.tier) == (demand.tenant, &demand.admitted.class, demand.admitted.tier);
            assert!(!is_own || rank(one, other) > rank(demand, ticket), "one of its own was sooner");
        }
    }

    fn finish(&mut self, flow: &mut Flow, nth: usize, work: u32) {
        if self.tickets.is_empty() {
            return;
        }
        let ticket = self.tickets[nth % self.tickets.len()];
        flow.finish(ticket, work, self.now_ms);
        if self.running.remove(&ticket).is_some() {
            self.finished += 1;
        } else if self.waiting.remove(&ticket).is_some() || self.displaced.remove(&ticket).is_some() {
            self.left += 1;
        }
    }

    fn check(&self, flow: &Flow) {
        flow.audit().unwrap();
        assert_eq!((flow.waiting() as usize, flow.running() as usize), (self.waiting.len(), self.running.len()));
        assert_eq!(flow.waiting_tokens(), self.tokens());
        assert_eq!(flow.wake_at(), self.waiting.values().map(|known| known.demand.deadline_ms).min());
        let ended = self.refused + self.expired + self.left + self.finished;
        assert_eq!(self.arrived, ended + self.waiting.len() + self.displaced.len() + self.running.len());
        for pool in 0..2 {
            let load = flow.pool(pool, self.now_ms);
            assert_eq!((load.queued as usize, load.running), (self.of_pool(pool).count(), self.runs(pool).0));
            assert!(load.predicted_wait_ms.is_nan() || load.predicted_wait_ms >= 0.0);
        }
    }

    fn of_pool(&self, pool: u64) -> impl Iterator<Item = &Known> {
        self.waiting.values().filter(move |known| known.demand.pool == pool)
    }

    fn runs(&self, pool: u64) -> (u32, u64) {
        let running = || self.running.values().filter(move |known| known.demand.pool == pool);
        let prefilling = running().filter(|known| known.prefilling);
        (running().count() as u32, prefilling.map(|known| u64::from(known.demand.prompt_tokens)).sum())
    }

    fn fits(&self, demand: &Demand) -> bool {
        let (running, prefill_tokens) = self.runs(demand.pool);
        self.rooms.get(&demand.pool).is_some_and(|room| {
            let tokens = prefill_tokens + u64::from(demand.prompt_tokens);
            room.workers > 0
                && room.requests.is_none_or(|max| running < max)
                && (prefill_tokens == 0 || room.tokens.is_none_or(|max| tokens <= max.into()))
        })
    }

    fn has_later(&self, tier: u32) -> bool {
        self.waiting.values().any(|known| known.demand.admitted.tier > tier)
    }

    fn tokens(&self) -> u64 {
        self.waiting.values().map(|known| u64::from(known.demand.prompt_tokens)).sum()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_request_ends_once_within_bounds_room_and_order(events in proptest::collection::vec(event(), 1..200)) {
        let mut flow = Flow::new(Bounds { max_requests: 8, max_tokens: 1000 });
        let mut model = Model::default();
        for event in events {
            match event {
                Event::Arrive { pool, class, tenant, tier, priority, prompt_tokens, output, patience_ms } => {
                    let admitted = Admitted {
                        class: (class > 0).then(|| format!("class-{class}").into()),
                        tier,
                        class_weight: 1.0 + f32::from(class),
                        tenant_weight: 0.5 + tenant as f32,
                        priority: priority.into(),
                        deadline_ms: None,
                    };
                    let (work, deadline_ms) = (prompt_tokens + output, model.now_ms + patience_ms);
                    model.arrive(&mut flow, Demand { pool, tenant, admitted, prompt_tokens, work, deadline_ms });
                }
                Event::Finish { nth, work } => model.finish(&mut flow, nth, work),
                Event::Prefilled { nth } if !model.tickets.is_empty() => {
                    let ticket = model.tickets[nth % model.tickets.len()];
                    flow.prefilled(ticket);
                    model.running.entry(ticket).and_modify(|known| known.prefilling = false);
                }
                Event::Prefilled { .. } => (),
                Event::Room { pool, room } => {
                    flow.set_room(pool, room);
                    model.rooms.insert(pool, room);
                }
                Event::Bounds(bounds) => flow.set_bounds(bounds),
                Event::Pass { ms } => model.now_ms += ms,
                Event::Act => model.act(&mut flow),
            }
            model.check(&flow);
        }
        // All leave, and nothing is left of them.
        for nth in 0..model.tickets.len() {
            model.finish(&mut flow, nth, 1);
        }
        model.check(&flow);
        (0..2).for_each(|pool| flow.set_room(pool, Room::default()));
        prop_assert_eq!((flow.shares.len(), flow.waiting(), flow.waiting_tokens(), flow.running()), (0, 0, 0, 0));
        prop_assert_eq!((flow.slots.iter().count(), flow.select(u64::MAX)), (0, None));
    }

    /// The bound of start-time fair queueing, at every moment: so nobody starves either.
    #[test]
    fn tenants_with_requests_waiting_are_even_but_for_their_largest(
        sources in proptest::collection::vec((0.1f32..10.0, 1u32..1000), 2..6),
        slots in 1u32..8,
        ends in proptest::collection::vec((any::<usize>(), 1u32..1000), 1..300),
    ) {
        let mut flow = flow(10_000, u64::MAX, room(0));
        let mut owners = HashMap::new();
        let come = |flow: &mut Flow, owners: &mut HashMap<Ticket, (usize, u32)>, source: usize, work: u32| {
            let (tenant_weight, largest) = sources[source];
            let work = work.min(largest);
            let admitted = Admitted { tenant_weight, ..Admitted::default() };
            owners.insert(queued(flow, Demand { admitted, work, ..demand(source as u64) }), (source, work));
        };
        (0..3).for_each(|_| (0..sources.len()).for_each(|source| come(&mut flow, &mut owners, source, u32::MAX)));
        flow.set_room(POOL, room(slots));
        let mut served = vec![0.0; sources.len()];
        let mut running = Vec::new();
        for (nth, work) in ends {
            while let Some(action) = flow.select(0) {
                flow.apply(action, 0);
                let Action::Start(ticket) = action else { panic!("{action:?}") };
                let (source, started) = owners[&ticket];
                served[source] += f64::from(started) / f64::from(sources[source].0);
                running.push(ticket);
                come(&mut flow, &mut owners, source, work);
                for one in 0..sources.len() {
                    for other in 0..one {
                        let largest = |source: usize| f64::from(sources[source].1) / f64::from(sources[source].0);
                        let difference: f64 = served[one] - served[other];
                        prop_assert!(difference.abs() <= largest(one) + largest(other) + 1e-6, "{served:?}");
                    }
                }
            }
            let ticket: Ticket = running.swap_remove(nth % running.len());
            flow.finish(ticket, owners[&ticket].1, 0);
        }
        flow.audit().unwrap();
    }
}
