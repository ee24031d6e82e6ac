//! How long prompt and output are, as the client is told: what no stream has said is asked of an engine's tokenizer, for a moment
//! at most, or reckoned.

use std::{sync::Arc, time::Instant};

use dynamo_engine_api::{Chunk, Endpoint, Engine};
use dynamo_host_core::{Among, RequestFacts};
use futures_util::StreamExt;
use tokio::time::{Instant as At, timeout, timeout_at};

use super::{Leg, Shared, TAIL};

impl Shared {
    /// Sees to it that the prompt of a choice is counted: by the engine where it can, else as far as it can be reckoned.
    pub(super) async fn count_prompt(&self, index: u32, reckoned: Option<u32>, engine: &dyn Engine) {
        let prompt = self.original.prompt_of(index);
        if self.splice.tally.knows(prompt) {
            return;
        }
        let counted = match self.original.with_prompt_of(index) {
            Some(body) => {
                let asked = timeout(TAIL, engine.tokenize(self.original.endpoint(), body)).await;
                asked.ok().and_then(Result::ok).flatten()
            }
            None => None,
        };
        if let Some(tokens) = counted.map(|ids| ids.len() as u32).or(reckoned) {
            self.splice.tally.prompt(prompt, tokens);
        }
    }
}

impl Leg {
    /// Learns from what the engine counted how long the client's own prompt is.
    pub(super) fn hear_usage(&mut self, chunk: &Chunk) {
        if let (Some(usage), Some(running)) = (chunk.summary.usage, &self.running)
            && usage.prompt_tokens > running.before
        {
            let tokens = usage.prompt_tokens - running.before;
            if running.is_exact {
                self.shared.splice.tally.prompt(self.shared.original.prompt_of(self.index), tokens);
            } else {
                self.reckoned = Some(tokens);
            }
        }
    }

    /// Hears a worker out that has finished the choice: what it counted comes last.
    pub(super) async fn finish(&mut self) {
        let Some(running) = &mut self.running else { return };
        let engine = Arc::clone(&running.engine);
        if running.account.has_ended() {
            self.running = None;
        }
        let until = At::now() + TAIL;
        while let Some(running) = &mut self.running {
            match timeout_at(until, running.chunks.next()).await {
                Ok(Some(Ok(chunk))) => {
                    running.account.chunk(&chunk, Instant::now());
                    self.hear_usage(&chunk);
                }
                _ => {
                    running.account.stop();
                    self.running = None;
                }
            }
        }
        self.shared.count_prompt(self.index, self.reckoned, &*engine).await;
    }

    /// Counts the output of a stream that tells no ids, once. A busy engine puts several tokens into one event, so that events
    /// are too few; its tokenizer cuts the text into about as many as were made.
    pub(super) async fn count_output(&mut self) {
        let is_told = !self.shared.original.is_retold() || self.choice.text.is_empty();
        if std::mem::replace(&mut self.is_counted, true) || is_told {
            return;
        }
        let Some(engine) = self.engines().into_iter().find(|engine| engine.continues().gives_ids) else { return };
        let body = self.shared.original.text_alone(&self.choice.text);
        let asked = timeout(TAIL, engine.tokenize(Endpoint::Completions, body)).await;
        if let Some(ids) = asked.ok().and_then(Result::ok).flatten() {
            self.choice.tokens = self.choice.tokens.max(ids.len() as u32);
        }
    }

    /// Engines that could go on with it.
    pub(super) fn engines(&self) -> Vec<Arc<dyn Engine>> {
        let snapshot = self.shared.course.lane.roster.snapshot();
        // One that failed the choice can count all the same, and may be well again.
        let facts = RequestFacts { failed_workers: Vec::new(), ..self.facts.clone() };
        // Where nobody serves whole requests, it is those that decode who go on.
        let whole = snapshot.candidates(&facts);
        let Ok(candidates) = whole.or_else(|_| snapshot.candidates_among(&facts, Among::Decoders)) else { return Vec::new() };
        (0..candidates.count()).map(|row| Arc::clone(snapshot.engine(candidates.worker(row).id))).collect()
    }
}
