use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const MEGABYTE: u64 = 1_000_000;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Megabytes per second, out and in.
fn port(egress: u64, ingress: u64) -> Port {
    Port { egress: egress * MEGABYTE, ingress: ingress * MEGABYTE }
}

/// All that end, in their order, with whole milliseconds.
fn ends(links: &mut KvLinks) -> Vec<(u64, u128)> {
    let mut ended = Vec::new();
    while let Some(at) = links.next_end() {
        links.advance(at, &mut ended);
    }
    ended.iter().map(|ended| (ended.transfer.0, ended.at.as_millis())).collect()
}

#[test]
fn a_transfer_alone_takes_its_bytes_at_the_slower_end_and_the_latency() {
    let mut links = KvLinks::new(vec![port(1000, 1), port(1, 500)], ms(3));
    links.begin(ms(10), 0, 1, 50 * MEGABYTE);
    assert_eq!((links.next_end(), links.under_way()), (Some(ms(10 + 100 + 3)), 1));
    assert_eq!(ends(&mut links), [(0, 113)]);
    assert_eq!((links.next_end(), links.under_way()), (None, 0));
}

#[test]
fn transfers_from_one_worker_share_its_way_out() {
    let mut links = KvLinks::new(vec![port(100, 100); 3], ms(0));
    links.begin(ms(0), 0, 1, 10 * MEGABYTE);
    links.begin(ms(0), 0, 2, 20 * MEGABYTE);
    assert_eq!(ends(&mut links), [(0, 200), (1, 300)], "the second has all of it when the first has ended");
}

#[test]
fn transfers_to_one_worker_share_its_way_in_and_ways_are_independent() {
    let mut links = KvLinks::new(vec![port(100, 100); 3], ms(0));
    links.begin(ms(0), 0, 2, 10 * MEGABYTE);
    links.begin(ms(50), 1, 2, 10 * MEGABYTE);
    links.begin(ms(50), 2, 0, 10 * MEGABYTE);
    assert_eq!(ends(&mut links), [(0, 150), (2, 150), (1, 200)]);
}

#[test]
fn what_one_cannot_use_is_for_the_others() {
    // From 0 to 1, which is slow, and to 2: the first has 20 of 100, the second the other 80.
    let mut links = KvLinks::new(vec![port(100, 100), port(100, 20), port(100, 100)], ms(0));
    links.begin(ms(0), 0, 1, 10 * MEGABYTE);
    links.begin(ms(0), 0, 2, 40 * MEGABYTE);
    assert_eq!(ends(&mut links), [(0, 500), (1, 500)]);
}

#[test]
fn what_is_cancelled_never_ends_and_leaves_its_share() {
    let mut links = KvLinks::new(vec![port(100, 100); 2], ms(5));
    let gone = links.begin(ms(0), 0, 1, 100 * MEGABYTE);
    links.begin(ms(0), 0, 1, 20 * MEGABYTE);
    assert!(links.cancel(ms(100), gone));
    assert!(!links.cancel(ms(100), gone));
    // 5 MB by then, 15 MB alone.
    assert_eq!(links.next_end(), Some(ms(255)));
    let mut ended = Vec::new();
    links.advance(ms(252), &mut ended);
    assert_eq!(ended, []);
    let arriving = links.begin(ms(252), 1, 0, 0);
    assert!(links.cancel(ms(253), arriving), "between the last byte and its arrival, too");
    assert_eq!(ends(&mut links), [(1, 255)]);
}

#[test]
fn who_looks_late_is_told_when_it_was() {
    let mut links = KvLinks::new(vec![port(100, 100); 2], ms(1));
    links.begin(ms(0), 0, 1, 10 * MEGABYTE);
    links.begin(ms(500), 0, 1, 10 * MEGABYTE);
    let mut ended = Vec::new();
    links.advance(ms(9000), &mut ended);
    assert_eq!(ended.iter().map(|ended| ended.at).collect::<Vec<_>>(), [ms(101), ms(601)]);
}

#[test]
fn hardly_any_bandwidth_is_still_some() {
    let mut links = KvLinks::new(vec![Port::both(1); 2], ms(0));
    (0..3).for_each(|_| _ = links.begin(ms(0), 0, 1, 1));
    assert_eq!(ends(&mut links).len(), 3);
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Begin { from: usize, to: usize, bytes: u64 },
    Cancel(usize),
    Wait(u64),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (0..4_usize, 0..4_usize, 0..5_000_u64).prop_map(|(from, to, bytes)| Act::Begin { from, to, bytes }),
        1 => any::<usize>().prop_map(Act::Cancel),
        3 => (0..2_000_000_000_u64).prop_map(Act::Wait),
    ]
}

/// Bytes through each side of each port, in billionths, while time goes from one end or beginning to the next.
#[derive(Default)]
struct Meter {
    moved: BTreeMap<TransferId, u128>,
}

impl Meter {
    /// Goes to `until`, with each stretch of constant rates on its own.
    fn go(&mut self, links: &mut KvLinks, until: Duration, ended: &mut Vec<Ended>) {
        while links.now < until {
            let next = links.next_drained().unwrap_or(until).min(until);
            self.stretch(links, next.saturating_sub(links.now));
            links.advance(next, ended);
        }
        links.advance(until, ended);
    }

    fn stretch(&mut self, links: &KvLinks, time: Duration) {
        let nanoseconds = time.as_nanos();
        let count = links.ports.len();
        let mut rates = vec![0_u64; 2 * count];
        for (&id, moving) in &links.moving {
            assert!(moving.rate > 0, "nobody is left out");
            rates[moving.from] += moving.rate;
            rates[count + moving.to] += moving.rate;
            let moved = moving.left.min(u128::from(moving.rate) * nanoseconds);
            *self.moved.entry(id).or_default() += moved;
        }
        let capacity = |side: usize| if side < count { links.ports[side].egress } else { links.ports[side - count].ingress };
        assert!((0..2 * count).all(|side| rates[side] <= capacity(side)), "no port moves more than it can: {rates:?}");
        for moving in links.moving.values() {
            // Max-min: at one of its ends, the port is full and nobody there has more. Up to what division leaves.
            let among = links.moving.len() as u64;
            let held_up = [moving.from, count + moving.to].into_iter().any(|side| {
                let here = links.moving.values().filter(|other| other.from == side || count + other.to == side);
                rates[side] + among >= capacity(side) && here.map(|other| other.rate).max().unwrap() <= moving.rate + among
            });
            assert!(held_up, "{moving:?} could have more: {rates:?}");
        }
    }
}

proptest! {
    #[test]
    fn every_byte_is_moved_once_and_within_the_ports(
        speeds in prop::collection::vec((50..5_000_u64, 50..5_000_u64), 4),
        latency in 0..1_000_000_u64,
        acts in prop::collection::vec(act(), 0..60),
    ) {
        let ports: Vec<_> = speeds.iter().map(|&(egress, ingress)| Port { egress, ingress }).collect();
        let mut links = KvLinks::new(ports.clone(), Duration::from_nanos(latency));
        // The same, looked at only at the acts.
        let mut rarely = KvLinks::new(ports, Duration::from_nanos(latency));
        let (mut meter, mut now) = (Meter::default(), Duration::ZERO);
        let (mut begun, mut cancelled, mut ended, mut ended_rarely) = (BTreeMap::new(), 0, Vec::new(), Vec::new());
        for &act in &acts {
            match act {
                Act::Begin { from, to, bytes } => {
                    let id = links.begin(now, from, to, bytes);
                    prop_assert_eq!(rarely.begin(now, from, to, bytes), id);
                    begun.insert(id, bytes);
                }
                Act::Cancel(at) if !begun.is_empty() => {
                    let id = *begun.keys().nth(at % begun.len()).unwrap();
                    rarely.advance(now, &mut ended_rarely);
                    let was_there = links.cancel(now, id);
                    prop_assert_eq!(rarely.cancel(now, id), was_there);
                    cancelled += usize::from(was_there);
                }
                Act::Cancel(_) => {}
                Act::Wait(nanoseconds) => {
                    now += Duration::from_nanos(nanoseconds);
                    meter.go(&mut links, now, &mut ended);
                }
            }
        }
        now += Duration::from_secs(1_000_000);
        meter.go(&mut links, now, &mut ended);
        rarely.advance(now, &mut ended_rarely);
        prop_assert_eq!(&ended, &ended_rarely);
        prop_assert!(ended.is_sorted_by_key(|ended| ended.at));
        prop_assert_eq!(ended.len() + cancelled, begun.len());
        prop_assert_eq!((links.under_way(), links.next_end()), (0, None));
        for ended in &ended {
            let moved = meter.moved.get(&ended.transfer).copied().unwrap_or_default();
            prop_assert_eq!(moved, u128::from(begun[&ended.transfer]) * 1_000_000_000);
        }
    }
}
