//! Who goes on with a choice whose worker is lost: the policy is asked again and again, until a worker takes it, or a bound is
//! reached.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use dynamo_engine_api::{ChatContinuation, Continues};
use dynamo_host_index::Prompt;
use tokio::time::timeout;

use super::{Leg, give::Came};
use crate::{
    dispatch::Post,
    error::RequestError,
    migrate::{ask::Next, vigil::LOOK_EVERY},
    place::{Inquiry, Part, Placing, Way, place},
    request::Notes,
};

/// How long a worker that failed a choice is left alone, even if there is no other.
const REST: Duration = Duration::from_secs(1);
/// The pause before a second continuation in a row; each further one is twice as long, and none longer than the last.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// An engine that can do everything.
const EVERYTHING: Continues = Continues { gives_ids: true, takes_ids: true, chat: Some(ChatContinuation::Prefill) };

impl Leg {
    /// Finds a worker that goes on. Frames: none was needed.
    pub(super) async fn resume(&mut self) -> Result<Option<Bytes>, RequestError> {
        self.choice.settle();
        self.count_output().await;
        let shared = Arc::clone(&self.shared);
        let (course, splice) = (&shared.course, &shared.splice);
        splice.tally.output(self.index, self.choice.tokens);
        let max_model_len = course.lane.roster.snapshot().max_model_len(&self.facts);
        if let Next::Full = self.next_ask(self.some_engine(max_model_len), max_model_len)? {
            return Ok(Some(self.full().await));
        }
        self.prepare_facts();
        let prompt = match (&self.choice.prompt_ids, course.prompt.is_exact()) {
            (Some(ids), true) if **ids == **course.prompt.tokens() => Arc::new(course.prompt.followed_by(&self.choice.ids)),
            _ => Arc::clone(&course.prompt),
        };
        loop {
            if self.attempts >= course.migration.max_attempts {
                return Err(self.failure.clone().into());
            }
            let (pause, deadline) = (self.pause(), course.patience.deadline);
            tokio::time::sleep_until((Instant::now() + pause).min(deadline).into()).await;
            if Instant::now() >= deadline {
                return Err(course.patience.exceeded());
            }
            self.facts.attempt = self.attempts;
            self.facts.failed_workers = self.failed.iter().map(|(worker, _)| *worker).collect();
            let placing = self.place(&prompt).await?;
            let mut unsound = None;
            for &way in &placing.ways {
                let post = Post::new(&placing, way.first());
                let came = match way {
                    Way::Alone(_) => self.give(post, &prompt).await?,
                    Way::Prefill(_) => self.give_pair(post, None, &prompt).await?,
                    Way::Pair(_, decode) => self.give_pair(post, Some(decode), &prompt).await?,
                };
                match came {
                    Came::Taken => {
                        self.count("continued");
                        return Ok(None);
                    }
                    Came::Full => return Ok(Some(self.full().await)),
                    Came::Unsound(error) => unsound = Some(error),
                    // Others may have come, or be known to be gone.
                    Came::Failed => {
                        unsound = None;
                        break;
                    }
                }
            }
            if let Some(error) = unsound {
                return Err(error);
            }
        }
    }

    /// Ends a choice that has all its tokens.
    async fn full(&mut self) -> Bytes {
        // Nobody goes on with it who would say how long its prompt is.
        if let Some(engine) = self.engines().into_iter().next() {
            self.shared.count_prompt(self.index, self.reckoned, &*engine).await;
        }
        self.shared.splice.full(self.index, &mut self.choice).into()
    }

    /// What an engine can do that could go on with it: without any, nothing is worth waiting for.
    fn some_engine(&self, max_model_len: Option<u32>) -> Continues {
        let mut kinds: Vec<Continues> = Vec::new();
        for kind in self.engines().iter().map(|engine| engine.continues()) {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        // Nobody is there: whoever comes may do anything.
        let Some(&first) = kinds.first() else { return EVERYTHING };
        kinds.into_iter().find(|&kind| self.next_ask(kind, max_model_len).is_ok()).unwrap_or(first)
    }

    pub(super) fn next_ask(&self, engine: Continues, max_model_len: Option<u32>) -> Result<Next, RequestError> {
        self.shared.original.next(self.index, &self.choice, engine, max_model_len).map_err(|unsound| self.unsound(unsound))
    }

    /// What policies may know of it now.
    fn prepare_facts(&mut self) {
        let base = &self.shared.course.facts;
        let generated = self.choice.tokens;
        self.facts.generated_tokens = generated;
        self.facts.prompt.tokens = base.prompt.tokens.saturating_add(generated);
        self.facts.max_output_tokens = base.max_output_tokens.map(|most| most.saturating_sub(generated));
        self.facts.expected_output_tokens = base.expected_output_tokens.map(|expected| expected.saturating_sub(generated));
    }

    /// How long to wait after what was in vain: not always the same.
    fn pause(&self) -> Duration {
        let Some(doublings) = self.in_vain.checked_sub(1) else { return Duration::ZERO };
        let longest = (PAUSE * 2u32.saturating_pow(doublings.min(8))).min(LONGEST_PAUSE);
        let chance = RandomState::new().hash_one(self.in_vain) as u8;
        longest.mul_f32(0.5 + f32::from(chance) / 510.0)
    }

    /// Asks where it shall go; waits while there is nobody.
    async fn place(&mut self, prompt: &Prompt) -> Result<Placing, RequestError> {
        let shared = Arc::clone(&self.shared);
        let course = &shared.course;
        let until = (Instant::now() + course.lane.roster.health().hold()).min(course.patience.deadline);
        let mut changes = course.lane.roster.changes();
        loop {
            let (recorder, patience) = (course.recorder.as_ref(), &course.patience);
            let inquiry = Inquiry { part: Part::Whole, pinned: &course.pinned, prompt, recorder, patience, until: None };
            let error = match place(&course.lane, &inquiry, &mut self.facts, &mut Notes::default()).await {
                Err(error @ RequestError::NoWorker { .. }) => error,
                other => return other,
            };
            let now = Instant::now();
            if now >= course.patience.deadline {
                return Err(course.patience.exceeded());
            }
            // Whoever failed it may be the only one, and be well again.
            let before = self.facts.failed_workers.len();
            self.facts.failed_workers =
                self.failed.iter().filter(|(_, at)| now - *at < REST).map(|(worker, _)| *worker).collect();
            if self.facts.failed_workers.len() < before {
                self.failed.retain(|(_, at)| now - *at < REST);
                continue;
            }
            if now >= until {
                return Err(error);
            }
            let _ = timeout(LOOK_EVERY.min(until - now), changes.changed()).await;
        }
    }
}
