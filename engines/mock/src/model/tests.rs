//! The model in virtual time: nothing sleeps here.

mod properties;

use super::*;

/// Times that are easy to add up: a prefill token is 1 ms, a pass with prefill 100 ms more, a decode pass 10 ms.
pub(super) fn profile() -> Profile {
    Profile {
        block_size: 4,
        kv_blocks: 1000,
        max_num_seqs: 16,
        max_num_batched_tokens: 64,
        max_model_len: 1000,
        kv_bytes_per_token: 1000,
        prefill_ms_per_token_squared: 0.0,
        prefill_ms_per_token: 1.0,
        prefill_ms_base: 100.0,
        decode_ms_base: 10.0,
        decode_ms_per_sequence: 0.0,
        decode_ms_per_context_token: 0.0,
        speedup: 1.0,
    }
}

/// A prompt of `length` tokens that shares nothing with one of another `kind`.
pub(super) fn sequence(kind: u32, length: u32, output_tokens: u32) -> Sequence {
    Sequence {
        prompt: (0..length).map(|i| kind * 10_000 + i).collect(),
        first_output_token: 1_000_000,
        output_tokens,
        finish: FinishReason::Length,
        salt: 0,
        hold: false,
        remote: false,
    }
}

/// A model and its clock.
struct Run {
    model: EngineModel,
    now: Duration,
}

impl Run {
    fn new(profile: Profile) -> Self {
        Self { model: EngineModel::new(profile).unwrap(), now: Duration::ZERO }
    }

    fn submit(&mut self, sequence: Sequence) -> SequenceId {
        self.model.submit(self.now, sequence).unwrap()
    }

    /// One step: how long it took and what it generated.
    fn step(&mut self) -> Option<(u64, Vec<Event>)> {
        let end = self.model.begin_step(self.now)?;
        let took_ms = (end - self.now).as_millis() as u64;
        self.now = end;
        let mut events = Vec::new();
        self.model.end_step(&mut events);
        Some((took_ms, events))
    }

    fn finish(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.step()).flat_map(|(_, events)| events).collect()
    }

    /// Durations of the steps until all is done.
    fn steps_ms(&mut self) -> Vec<u64> {
        std::iter::from_fn(|| self.step()).map(|(ms, _)| ms).collect()
    }
}

/// Output indices of a sequence, in the order of the events.
fn indices(events: &[Event], id: SequenceId) -> Vec<u32> {
    events.iter().filter(|event| event.sequence == id).map(|event| event.index).collect()
}

#[test]
fn a_sequence_is_prefilled_and_then_decoded() {
    let mut run = Run::new(profile());
    let id = run.submit(sequence(1, 10, 3));
    let (ms, first) = run.step().unwrap();
    let expected = Event { sequence: id, index: 0, token: 1_000_000, cached_tokens: 0, finish: None };
    assert_eq!((ms, first), (110, vec![expected]));
    let snapshot = run.model.snapshot();
    assert_eq!((snapshot.running, snapshot.waiting, snapshot.kv_blocks_used), (1, 0, 3));
    assert_eq!(run.step().unwrap().0, 10);
    let (_, last) = run.step().unwrap();
    assert_eq!(last, [Event { index: 2, token: 1_000_002, finish: Some(FinishReason::Length), ..expected }]);
    assert_eq!(run.step(), None);
    let Snapshot { running, kv_blocks_used, stats, .. } = run.model.snapshot();
    assert_eq!((running, kv_blocks_used, stats.finished_length, stats.finished_stop), (0, 0, 1, 0));
    assert_eq!((stats.prompt_tokens, stats.generation_tokens, stats.steps), (10, 3, 3));
    assert_eq!((stats.time_to_first_token.sum_seconds(), stats.inter_token_latency.sum_seconds()), (0.11, 0.02));
    assert_eq!((stats.e2e_latency.sum_seconds(), stats.queue_time.sum_seconds()), (0.13, 0.0));
}

#[test]
fn a_cached_prefix_shortens_the_prefill() {
    let mut run = Run::new(profile());
    run.submit(sequence(1, 42, 1));
    assert_eq!(run.steps_ms(), [142]);
    run.submit(sequence(1, 42, 1));
    let (ms, events) = run.step().unwrap();
    assert_eq!((ms, events[0].cached_tokens), (102, 40));
    let stats = run.model.snapshot().stats;
    assert_eq!((stats.prefix_queries_tokens, stats.prefix_hits_tokens), (84, 40));
}

#[test]
fn a_prompt_is_never_a_hit_as_a_whole() {
    let mut run = Run::new(profile());
    run.submit(sequence(1, 40, 1));
    run.finish();
    run.submit(sequence(1, 40, 1));
    let (ms, events) = run.step().unwrap();
    assert_eq!((ms, events[0].cached_tokens), (104, 36), "the last block is computed again");
    assert_eq!(run.model.snapshot().kv_blocks_used, 0);
}

#[test]
fn generated_blocks_are_cached_for_the_next_turn() {
    let mut run = Run::new(profile());
    run.submit(sequence(1, 10, 11));
    run.finish();
    let mut next = sequence(1, 10, 1);
    next.prompt = next.prompt.iter().copied().chain((0..11).map(|i| 1_000_000 + i)).chain([5]).collect();
    run.submit(next);
    // The last token of an output is never computed: 20 of 21 tokens are known.
    assert_eq!(run.finish()[0].cached_tokens, 20);
}

#[test]
fn a_salt_keeps_equal_prompts_apart() {
    let mut run = Run::new(profile());
    run.submit(sequence(1, 40, 1));
    run.finish();
    run.submit(Sequence { salt: 7, ..sequence(1, 40, 1) });
    assert_eq!(run.finish()[0].cached_tokens, 0);
}

#[test]
fn equal_prompts_of_one_step_are_computed_once() {
    let mut run = Run::new(profile());
    run.submit(sequence(1, 21, 1));
    run.submit(sequence(1, 21, 1));
    let (ms, events) = run.step().unwrap();
    assert_eq!((ms, events[1].cached_tokens), (122, 20));
}

#[test]
fn a_long_prompt_is_computed_in_chunks_that_bound_a_step() {
    let mut run = Run::new(profile());
    run.submit(sequence(1, 150, 2));
    assert_eq!(run.steps_ms(), [164, 164, 122, 10]);
}

#[test]
fn a_decode_is_delayed_by_a_prefill_in_its_step() {
    let mut run = Run::new(profile());
    let decoding = run.submit(sequence(1, 5, 100));
    run.step();
    assert_eq!(run.step().unwrap().0, 10);
    run.submit(sequence(2, 30, 1));
    let (ms, events) = run.step().unwrap();
    assert_eq!((ms, indices(&events, decoding)), (130, vec![2]));
}

#[test]
fn decodes_come_before_prefills_in_a_steps_budget() {
    let mut run = Run::new(profile());
    let decoding: Vec<_> = (0..4).map(|kind| run.submit(sequence(kind, 5, 10))).collect();
    run.step();
    run.submit(sequence(9, 200, 1));
    for index in 1..5 {
        let (ms, events) = run.step().unwrap();
        assert_eq!(ms, if index < 4 { 160 } else { 120 });
        for &id in &decoding {
            assert_eq!(indices(&events, id), [index]);
        }
    }
}

#[test]
fn the_waiting_are_served_in_order_and_up_to_the_limit_of_sequences() {
    let mut run = Run::new(Profile { max_num_seqs: 2, ..profile() });
    let ids: Vec<_> = (0..5).map(|kind| run.submit(sequence(kind, 5, 2))).collect();
    run.step();
    let snapshot = run.model.snapshot();
    assert_eq!((snapshot.running, snapshot.waiting), (2, 3));
    let finished: Vec<_> = run.finish().iter().filter(|event| event.finish.is_some()).map(|event| event.sequence).collect();
    assert_eq!(finished, ids);
    assert_eq!(run.model.snapshot().stats.queue_time.count(), 5);
}

#[test]
fn a_sequence_waits_until_the_blocks_of_its_prompt_are_free() {
    let mut run = Run::new(Profile { kv_blocks: 10, max_model_len: 40, ..profile() });
    run.submit(sequence(1, 32, 3));
    let second = run.submit(sequence(2, 12, 1));
    run.step();
    let snapshot = run.model.snapshot();
    assert_eq!((snapshot.running, snapshot.waiting, snapshot.kv_blocks_used), (1, 1, 8));
    assert_eq!(snapshot.kv_usage(), 0.8);
    let events = run.finish();
    assert_eq!(indices(&events, second), [0]);
    assert_eq!(run.model.snapshot().stats.preemptions, 0);
}

#[test]
fn the_latest_is_preempted_and_computed_again_with_nothing_lost() {
    let mut run = Run::new(Profile { kv_blocks: 10, max_model_len: 40, ..profile() });
    let first = run.submit(sequence(1, 15, 20));
    let second = run.submit(sequence(2, 15, 20));
    let events = run.finish();
    let stats = run.model.snapshot().stats;
    assert!(stats.preemptions > 0);
    for id in [first, second] {
        assert_eq!(indices(&events, id), (0..20).collect::<Vec<_>>());
    }
    let finished: Vec<_> = events.iter().filter(|event| event.finish.is_some()).map(|event| event.sequence).collect();
    assert_eq!(finished, [first, second], "the older one is not the one to suffer");
    assert_eq!(stats.prompt_tokens, 30, "what is computed again is not counted again");
}

#[test]
fn a_cancelled_sequence_is_gone_at_once_wherever_it_is() {
    let mut run = Run::new(Profile { max_num_seqs: 2, ..profile() });
    let ids: Vec<_> = (0..6).map(|kind| run.submit(sequence(kind, 5, 5))).collect();
    run.step();
    run.model.begin_step(run.now).unwrap();
    for at in [0, 3, 4, 2] {
        assert!(run.model.cancel(ids[at]), "running, in the middle of the queue, and at its front");
        assert!(!run.model.cancel(ids[at]), "it ends once");
    }
    let snapshot = run.model.snapshot();
    assert_eq!((snapshot.running, snapshot.waiting, snapshot.kv_blocks_used, snapshot.stats.cancelled), (1, 1, 2, 4));
    let mut events = Vec::new();
    run.model.end_step(&mut events);
    assert_eq!(events.len(), 1, "a step that it was part of brings it nothing");
    events.extend(run.finish());
    for at in [1, 5] {
        assert_eq!(events.iter().filter(|event| event.sequence == ids[at] && event.finish.is_some()).count(), 1);
    }
    assert!(!run.model.cancel(ids[5]), "a finished one cannot be cancelled");
    assert!(run.model.is_idle());
}

#[test]
fn what_can_never_run_is_refused() {
    let mut run = Run::new(profile());
    let mut submit = |sequence| run.model.submit(Duration::ZERO, sequence);
    assert_eq!(submit(sequence(1, 0, 1)), Err(SubmitError::EmptyPrompt));
    assert_eq!(submit(sequence(1, 1, 0)), Err(SubmitError::NoOutput));
    assert_eq!(submit(sequence(1, 990, 11)), Err(SubmitError::TooLong { tokens: 1001, max_model_len: 1000 }));
    assert!(submit(sequence(1, 990, 10)).is_ok());
}

#[test]
fn the_longest_sequence_fits_exactly() {
    let mut run = Run::new(Profile { kv_blocks: 10, max_model_len: 40, ..profile() });
    run.submit(sequence(1, 1, 39));
    run.submit(sequence(2, 39, 1));
    assert_eq!(run.finish().len(), 40);
}

#[test]
fn the_cache_is_dropped_only_while_nobody_uses_it() {
    let mut run = Run::new(profile());
    run.model.record_cache_events();
    run.submit(sequence(1, 40, 2));
    run.step();
    assert!(!run.model.reset_prefix_cache());
    run.finish();
    assert!(run.model.reset_prefix_cache());
    assert_eq!(run.model.take_cache_events().last(), Some(&CacheEvent::Cleared));
    run.submit(sequence(1, 40, 1));
    assert_eq!(run.finish()[0].cached_tokens, 0);
}

#[test]
fn cache_events_carry_what_a_router_needs() {
    let mut run = Run::new(profile());
    run.model.record_cache_events();
    run.submit(sequence(1, 9, 4));
    run.finish();
    let prompt: Vec<u32> = sequence(1, 9, 1).prompt.to_vec();
    let hashes = vec![block_hash(0, &prompt[..4]), block_hash(block_hash(0, &prompt[..4]), &prompt[4..8])];
    let third: Vec<u32> = [prompt[8], 1_000_000, 1_000_001, 1_000_002].to_vec();
    let all = CacheEvent::Stored {
        parent: None,
        hashes: [hashes.clone(), vec![block_hash(hashes[1], &third)]].concat(),
        tokens: [&prompt[..8], &third].concat(),
    };
    assert_eq!(run.model.take_cache_events(), [all]);
    run.submit(sequence(1, 9, 1));
    run.finish();
    assert_eq!(run.model.take_cache_events(), [], "a hit is no news");
}
