//! What the queue costs: median nanoseconds of each call, the clock's own included, with so many requests waiting. `cargo xtask bench flow` runs it in release.

#![allow(clippy::print_stdout, reason = "it prints what it measured")]

use std::{
    collections::{HashSet, VecDeque},
    hint::black_box,
    sync::Arc,
    time::Instant,
};

use dynamo_host_core::Admitted;
use dynamo_host_flow::{Action, Arrival, Bounds, Demand, Flow, Room, Ticket};

const ROUNDS: usize = 200_000;
/// They share by weight.
const CLASSES: usize = 4;
/// Tenants of each class.
const TENANTS: u64 = 64;

fn main() {
    println!("{:>8}  {:>8}  {:>8}  {:>8}  {:>8}  {:>8}", "waiting", "arrive", "leave", "finish", "select", "apply");
    for waiting in [0, 1000, 100_000] {
        let row = measure(waiting).map(|times| format!("{:>8}", median(times)));
        println!("{waiting:>8}  {}", row.join("  "));
    }
}

/// Requests of all classes and tenants in turn.
fn demands() -> Vec<Demand> {
    let classes: Vec<Arc<str>> = (0..CLASSES).map(|class| format!("class-{class}").into()).collect();
    let demand = |nth: u64| {
        let class = nth as usize % CLASSES;
        let admitted = Admitted {
            class: Some(Arc::clone(&classes[class])),
            class_weight: (1 << class) as f32,
            tenant_weight: 1.0 + (nth % 3) as f32,
            ..Admitted::default()
        };
        let prompt_tokens = 100 + (nth * 7919 % 2000) as u32;
        Demand {
            pool: 1,
            tenant: nth / 5 % TENANTS,
            admitted,
            prompt_tokens,
            work: prompt_tokens + 200,
            deadline_ms: 600_000 + nth,
        }
    };
    (0..10_007).map(demand).collect()
}

/// Takes down how many nanoseconds something took.
fn timed<T>(times: &mut Vec<u64>, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let done = black_box(work());
    times.push(begun.elapsed().as_nanos() as u64);
    done
}

/// The median, since others use the machine too.
fn median(mut times: Vec<u64>) -> u64 {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Of an arrival, a leave of one that waits, an end, a look at what is next, and its start. With nobody waiting, an arrival
/// starts at once, and there is nothing to select.
fn measure(waiting: usize) -> [Vec<u64>; 5] {
    let mut flow = Flow::new(Bounds { max_requests: u32::MAX, max_tokens: u64::MAX });
    flow.set_room(1, Room { workers: 8, requests: Some(if waiting == 0 { u32::MAX } else { 256 }), tokens: None });
    let demands = demands();
    let mut demands = demands.iter().cycle();
    let [mut arrive, mut leave, mut finish, mut select, mut apply] = [const { Vec::new() }; 5];
    let (mut queued, mut started, mut running) = (Vec::new(), HashSet::new(), VecDeque::new());
    let mut come = |flow: &mut Flow, queued: &mut Vec<Ticket>, running: &mut VecDeque<Ticket>, times: &mut Vec<u64>| {
        let demand = demands.next().expect("they repeat themselves").clone();
        match timed(times, || flow.arrive(demand, 0)).expect("the queue takes all") {
            Arrival::Started(ticket) => running.push_back(ticket),
            Arrival::Queued(ticket) => queued.push(ticket),
        }
    };
    for _ in 0..256 + waiting {
        come(&mut flow, &mut queued, &mut running, &mut Vec::new());
    }
    for round in 0..ROUNDS {
        come(&mut flow, &mut queued, &mut running, &mut arrive);
        let ended = running.pop_front().expect("some run");
        timed(&mut finish, || flow.finish(ended, 300, 1));
        if let Some(action @ Action::Start(ticket)) = timed(&mut select, || flow.select(1)) {
            timed(&mut apply, || flow.apply(action, 1));
            running.push_back(ticket);
            started.insert(ticket);
        }
        if waiting > 0 {
            come(&mut flow, &mut queued, &mut running, &mut arrive);
            // Anyone who still waits.
            let mut anyone = || queued.swap_remove(round.wrapping_mul(0x9e37_79b9) % queued.len());
            let gone = std::iter::repeat_with(&mut anyone).find(|ticket| !started.remove(ticket)).expect("some wait");
            timed(&mut leave, || flow.finish(gone, 0, 1));
        }
    }
    [arrive, leave, finish, select, apply]
}
