use std::time::Duration;

use crate::model::{
    CacheEvent, Ended, EngineModel, Event, Fetch, KvLinks, Port, Profile, Sequence, SequenceId, Snapshot,
    tests::{self, sequence},
};

/// The usual times, and little memory.
fn profile() -> Profile {
    Profile { kv_blocks: 20, max_num_seqs: 4, max_model_len: 80, ..tests::profile() }
}

fn remote(kind: u32, length: u32, output_tokens: u32) -> Sequence {
    Sequence { remote: true, ..sequence(kind, length, output_tokens) }
}

fn held(kind: u32, length: u32) -> Sequence {
    Sequence { hold: true, ..sequence(kind, length, 1) }
}

struct Run {
    model: EngineModel,
    now: Duration,
    fetches: Vec<Fetch>,
}

impl Run {
    fn new(profile: Profile) -> Self {
        let mut model = EngineModel::new(profile).unwrap();
        model.record_cache_events();
        Self { model, now: Duration::ZERO, fetches: Vec::new() }
    }

    fn submit(&mut self, sequence: Sequence) -> SequenceId {
        self.model.submit(self.now, sequence).unwrap()
    }

    /// One step: how long it took and what it generated.
    fn step(&mut self) -> Option<(u64, Vec<Event>)> {
        let end = self.model.begin_step(self.now);
        self.model.take_fetches(&mut self.fetches);
        let took_ms = (end? - self.now).as_millis() as u64;
        self.now += Duration::from_millis(took_ms);
        let mut events = Vec::new();
        self.model.end_step(&mut events);
        Some((took_ms, events))
    }

    fn finish(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.step()).flat_map(|(_, events)| events).collect()
    }
}

fn indices(events: &[Event], id: SequenceId) -> Vec<u32> {
    events.iter().filter(|event| event.sequence == id).map(|event| event.index).collect()
}

#[test]
fn a_prefill_keeps_its_blocks_until_it_is_released() {
    let mut run = Run::new(profile());
    let id = run.submit(held(1, 10));
    assert_eq!(run.finish().len(), 1);
    let Snapshot { running, waiting, held: finished, kv_blocks_held, kv_blocks_used, .. } = run.model.snapshot();
    assert_eq!((running, waiting, finished, kv_blocks_held, kv_blocks_used), (0, 0, 1, 3, 3));
    assert_eq!(run.model.held(id).map(<[u32]>::len), Some(3));
    assert!(!run.model.cancel(id), "it has ended");
    assert!(!run.model.reset_prefix_cache(), "what another engine may be reading is not dropped");
    assert!(run.model.release(id));
    assert!(!run.model.release(id), "once");
    assert_eq!((run.model.held_blocks(), run.model.free_blocks(), run.model.held(id)), (0, 20, None));
    run.submit(sequence(1, 10, 1));
    assert_eq!(run.finish()[0].cached_tokens, 8, "what was held is cached all the same");
}

#[test]
fn blocks_that_two_hold_are_counted_once() {
    let mut run = Run::new(profile());
    let ids = [run.submit(held(1, 9)), run.submit(held(1, 9))];
    run.finish();
    assert_eq!((run.model.held_blocks(), run.model.snapshot().held), (4, 2), "two shared, and one of each");
    assert!(ids.into_iter().all(|id| run.model.release(id)));
    assert_eq!(run.model.free_blocks(), 20);
}

#[test]
fn a_prompt_from_elsewhere_is_decoded_without_a_prefill() {
    let mut run = Run::new(profile());
    let id = run.submit(remote(1, 10, 3));
    assert_eq!(run.step(), None, "there is nothing to compute yet");
    assert_eq!(run.fetches, [Fetch { sequence: id, tokens: 10 }]);
    let Snapshot { running, waiting, fetching, kv_blocks_used, .. } = run.model.snapshot();
    assert_eq!((running, waiting, fetching, kv_blocks_used), (0, 1, 1, 3));
    assert_eq!((run.model.is_idle(), run.model.take_cache_events()), (false, vec![]));
    run.now += Duration::from_millis(50);
    assert!(run.model.fetched(id, run.now));
    assert!(!run.model.fetched(id, run.now), "once");
    let [CacheEvent::Stored { parent: None, hashes, .. }] = &run.model.take_cache_events()[..] else { panic!("not published") };
    assert_eq!(hashes.len(), 2, "the full blocks of the prompt");
    let (ms, events) = run.step().unwrap();
    assert_eq!((ms, indices(&events, id), events[0].cached_tokens), (10, vec![0], 0));
    assert_eq!(indices(&run.finish(), id), [1, 2]);
    let stats = run.model.snapshot().stats;
    assert_eq!((stats.prompt_tokens, stats.prompt_tokens_fetched, stats.prompt_tokens_computed()), (10, 10, 0));
    assert_eq!((stats.fetch_time.sum_seconds(), stats.queue_time.sum_seconds()), (0.05, 0.05));
}

#[test]
fn only_what_is_not_cached_is_fetched_and_that_is_never_nothing() {
    let mut run = Run::new(profile());
    run.submit(sequence(1, 9, 1));
    run.finish();
    let (longer, same) = (run.submit(remote(1, 14, 1)), run.submit(remote(1, 8, 1)));
    run.step();
    assert_eq!(run.fetches, [Fetch { sequence: longer, tokens: 6 }, Fetch { sequence: same, tokens: 4 }]);
    for id in [longer, same] {
        run.model.fetched(id, run.now);
    }
    let (ms, events) = run.step().unwrap();
    assert_eq!((ms, events.iter().map(|event| event.cached_tokens).collect::<Vec<_>>()), (10, vec![8, 4]));
}

#[test]
fn what_is_fetched_delays_nobody_and_has_no_place_meanwhile() {
    let mut run = Run::new(Profile { max_num_seqs: 1, ..profile() });
    let (first, fetching, local) = (run.submit(remote(1, 5, 2)), run.submit(remote(2, 5, 2)), run.submit(sequence(3, 5, 2)));
    assert_eq!(run.step().unwrap().0, 105, "the place is free for who can use it");
    assert_eq!(run.fetches.len(), 2);
    assert!(run.model.fetched(fetching, run.now) && run.model.fetched(first, run.now));
    let finished: Vec<_> = run.finish().into_iter().filter(|event| event.finish.is_some()).map(|event| event.sequence).collect();
    assert_eq!(finished, [local, first, fetching], "who has a place keeps it, then the oldest");
    assert_eq!(run.model.snapshot().stats.preemptions, 0);
}

#[test]
fn kv_that_does_not_come_is_computed_here() {
    let mut run = Run::new(profile());
    let id = run.submit(remote(1, 10, 2));
    run.step();
    assert!(run.model.fetch_failed(id));
    assert!(!run.model.fetched(id, run.now));
    let (ms, events) = run.step().unwrap();
    assert_eq!((ms, indices(&events, id)), (110, vec![0]));
    run.finish();
    let stats = run.model.snapshot().stats;
    assert_eq!((stats.prompt_tokens_fetched, stats.prompt_tokens_computed(), stats.fetches_failed), (0, 10, 1));
    assert_eq!(run.model.free_blocks(), 20);
}

#[test]
fn a_sequence_that_waits_for_kv_can_be_cancelled_at_any_time() {
    let mut run = Run::new(Profile { max_num_seqs: 1, ..profile() });
    run.submit(sequence(9, 5, 3));
    let [untold, fetching, arrived] = [1, 2, 3].map(|kind| run.submit(remote(kind, 5, 2)));
    run.step();
    assert_eq!(run.fetches, [], "with all places taken, nobody is admitted");
    run.finish();
    assert!(run.model.begin_step(run.now).is_none());
    run.model.fetched(arrived, run.now);
    for id in [untold, fetching, arrived] {
        assert!(run.model.cancel(id));
        assert!(!run.model.cancel(id));
        assert!(!run.model.fetched(id, run.now) && !run.model.fetch_failed(id));
    }
    assert!(run.model.is_idle());
    assert_eq!((run.model.free_blocks(), run.model.snapshot().stats.cancelled), (20, 3));
    assert_eq!(run.model.snapshot().stats.prompt_tokens, 5, "what never ran is not counted");
}

#[test]
fn what_is_preempted_after_it_came_is_computed_here() {
    let mut run = Run::new(Profile { kv_blocks: 10, max_model_len: 40, ..profile() });
    let (first, second) = (run.submit(sequence(1, 15, 20)), run.submit(remote(2, 15, 20)));
    let mut events = run.step().unwrap().1;
    run.model.fetched(second, run.now);
    events.extend(run.finish());
    assert!(run.model.snapshot().stats.preemptions > 0);
    assert_eq!(run.fetches.len(), 1, "what was fetched is not there any more");
    for id in [first, second] {
        assert_eq!(indices(&events, id), (0..20).collect::<Vec<_>>());
    }
}

#[test]
fn one_that_runs_alone_gives_way_to_kv_that_is_held_and_comes_back() {
    let mut run = Run::new(Profile { kv_blocks: 10, max_model_len: 40, ..profile() });
    let prefill = run.submit(held(1, 20));
    run.finish();
    let decode = run.submit(sequence(2, 20, 10));
    let mut events = run.finish();
    assert_eq!(indices(&events, decode), [0], "the sixth block is not to be had");
    let Snapshot { running, waiting, stats, .. } = run.model.snapshot();
    assert_eq!((running, waiting, stats.preemptions), (0, 1, 1));
    assert!(run.model.release(prefill));
    events.extend(run.finish());
    assert_eq!(indices(&events, decode), (0..10).collect::<Vec<_>>());
}

#[test]
fn those_that_wait_for_kv_with_all_blocks_let_the_others_go_on_afterwards() {
    let mut run = Run::new(Profile { kv_blocks: 10, max_model_len: 40, ..profile() });
    let ids = [run.submit(remote(1, 20, 8)), run.submit(remote(2, 20, 8)), run.submit(remote(3, 20, 8))];
    assert_eq!((run.step(), run.fetches.len(), run.model.free_blocks()), (None, 2, 0));
    run.model.fetched(ids[1], run.now);
    let mut events = run.finish();
    assert_eq!(indices(&events, ids[1]), [0], "it needs a block, and the first has the others");
    run.model.fetched(ids[0], run.now);
    events.extend(run.finish());
    assert_eq!(run.fetches.len(), 3);
    run.model.fetched(ids[2], run.now);
    events.extend(run.finish());
    for id in ids {
        assert_eq!(indices(&events, id), (0..8).collect::<Vec<_>>());
    }
    assert_eq!(run.model.free_blocks(), 10);
}

#[test]
fn a_prompt_goes_from_one_engine_to_another_in_the_time_that_its_bytes_take() {
    let (mut prefill, mut decode) = (Run::new(profile()), Run::new(profile()));
    let mut links = KvLinks::new(vec![Port::both(1_000_000); 2], Duration::from_millis(1));
    let first = prefill.submit(held(1, 10));
    prefill.finish();
    decode.now = prefill.now;
    let second = decode.submit(remote(1, 10, 3));
    decode.step();
    let [Fetch { sequence, tokens: 10 }] = decode.fetches[..] else { panic!("{:?}", decode.fetches) };
    let transfer = links.begin(decode.now, 0, 1, decode.model.profile().kv_bytes(10));
    let at = links.next_end().unwrap();
    assert_eq!(at, Duration::from_millis(110 + 12 + 1), "12,000 bytes, and the latency");
    let mut ended = Vec::new();
    links.advance(at, &mut ended);
    assert_eq!(ended, [Ended { transfer, at }]);
    decode.now = at;
    assert!(prefill.model.release(first) && decode.model.fetched(sequence, at));
    assert_eq!(indices(&decode.finish(), second), [0, 1, 2]);
    assert_eq!((prefill.model.free_blocks(), decode.model.free_blocks()), (20, 20));
}
