//! Tokens of a request's prompt: by the model's tokenizer, by one of its engines, or stand-ins for them.
//!
//! Contract: a prompt never fails a request, and never holds one for long. What is new of a long prompt is computed off the
//! threads of connections, by as many threads as half the cores, behind a bounded queue; who finds that full, waits too long,
//! or has an engine that is slow goes on with stand-ins. Every such turn is counted.

mod pool;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use dynamo_host_core::{Endpoint, RequestFacts};
use dynamo_host_tokens::{Asked, PromptTokens, RunCache, Tokenizer, TokenizerError};
use metrics::{Counter, counter, gauge};

use self::pool::{NotComputed, Pool};
use crate::{models::TokenizerSource, roster::Snapshot, text::plain};

/// Longest text that is tokenized where it is: some 2 ms.
const MAX_BYTES_HERE: usize = 16 << 10;

/// Longest body whose text is rendered where it is.
const MAX_BODY_HERE: usize = 128 << 10;

/// Longest body that is tokenized: a longer prompt is beyond all models, and would take seconds and gigabytes.
const MAX_BODY: usize = 8 << 20;

/// How long an engine is waited for.
const ENGINE_TIMEOUT: Duration = Duration::from_millis(250);

/// Longest body that an engine is asked about: it would not answer for a longer one in that time.
const MAX_BODY_FOR_ENGINE: usize = 256 << 10;

/// How long no engine is asked after one has failed: a prompt that waits in vain for its tokens is a prompt delayed.
const ENGINE_REST: Duration = Duration::from_secs(10);

/// What makes tokens of prompts.
pub(crate) struct Tokenizing {
    sources: HashMap<String, Source>,
    /// Of models that none is configured for: whether it was said that an engine failed.
    engine_was_told: AtomicBool,
    begun: Instant,
    /// Until when no engine is asked, since then.
    rest_until_ms: AtomicU64,
    runs: Arc<RunCache>,
    pool: Pool,
    /// Whether it was said that some could not be tokenized.
    was_told: AtomicBool,
    meters: Meters,
}

enum Source {
    Tokenizer(Arc<Tokenizer>),
    Engine {
        /// Whether it was said that one failed.
        was_told: AtomicBool,
    },
}

/// A prompt's tokens, and what keeps them apart from others' equal ones.
pub(crate) struct Tokenized {
    pub(crate) ids: Arc<[u32]>,
    pub(crate) is_exact: bool,
    pub(crate) cache_salt: Option<String>,
}

/// How tokens became known, as its metrics say it.
struct How {
    prompts: Counter,
    tokens: Counter,
}

struct Meters {
    tokenizer: How,
    engine: How,
    given: How,
    approximate: How,
    cached_bytes: Counter,
    computed_bytes: Counter,
    cache: metrics::Gauge,
}

impl Tokenizing {
    /// Reads the tokenizers of models.
    ///
    /// # Errors
    /// Which model's, and why.
    pub(crate) fn load(sources: &BTreeMap<String, TokenizerSource>) -> Result<Self, (String, TokenizerError)> {
        let runs = RunCache::new(RunCache::DEFAULT_BYTES);
        let load = |(name, source): (&String, &TokenizerSource)| {
            let source = match source {
                TokenizerSource::Directory(path) => {
                    Source::Tokenizer(Arc::new(Tokenizer::load(path, Arc::clone(&runs)).map_err(|error| (name.clone(), error))?))
                }
                TokenizerSource::Engine => Source::Engine { was_told: AtomicBool::new(false) },
            };
            Ok((name.clone(), source))
        };
        let sources = sources.iter().map(load).collect::<Result<_, _>>()?;
        Ok(Self {
            sources,
            engine_was_told: AtomicBool::new(false),
            begun: Instant::now(),
            rest_until_ms: AtomicU64::new(0),
            runs,
            pool: Pool::new(),
            was_told: AtomicBool::new(false),
            meters: Meters::new(),
        })
    }

    /// The tokens of a request's prompt.
    pub(crate) async fn tokenize(&self, facts: &RequestFacts, body: &Bytes, snapshot: &Snapshot) -> Tokenized {
        let asked = Asked::of(facts.endpoint, body);
        let cache_salt = asked.cache_salt();
        let (how, PromptTokens { ids, is_exact }) = self.tokens(&asked, facts, body, snapshot).await;
        how.prompts.increment(1);
        how.tokens.increment(ids.len() as u64);
        Tokenized { ids, is_exact, cache_salt }
    }

    async fn tokens(&self, asked: &Asked<'_>, facts: &RequestFacts, body: &Bytes, snapshot: &Snapshot) -> (&How, PromptTokens) {
        if let Some(tokens) = asked.given_ids() {
            return (&self.meters.given, tokens);
        }
        let found = match self.sources.get(&facts.model) {
            // Without the engine's tokens, all that it tells of its KV would be for nothing.
            None if snapshot.tells_of_kv(facts) => {
                self.by_engine(facts, body, snapshot, &self.engine_was_told).await.map(|tokens| (&self.meters.engine, tokens))
            }
            None => None,
            Some(Source::Tokenizer(tokenizer)) => {
                self.by_tokenizer(tokenizer, asked, facts.endpoint, body).await.map(|tokens| (&self.meters.tokenizer, tokens))
            }
            Some(Source::Engine { was_told }) => {
                self.by_engine(facts, body, snapshot, was_told).await.map(|tokens| (&self.meters.engine, tokens))
            }
        };
        found.unwrap_or_else(|| (&self.meters.approximate, asked.approximate()))
    }

    async fn by_tokenizer(
        &self,
        tokenizer: &Arc<Tokenizer>,
        asked: &Asked<'_>,
        endpoint: Endpoint,
        body: &Bytes,
    ) -> Option<PromptTokens> {
        let tokens = if body.len() > MAX_BODY {
            Err(NotComputed::TooLong)
        } else if body.len() > MAX_BODY_HERE {
            let (tokenizer, body) = (Arc::clone(tokenizer), body.clone());
            let work = move || {
                let begun = tokenizer.begin(&Asked::of(endpoint, &body))?;
                let (all, new) = (begun.text_bytes(), begun.uncached_bytes());
                Ok((tokenizer.finish(begun)?, all, new))
            };
            self.pool.run(work).await
        } else {
            match pool::here(|| tokenizer.begin(asked)) {
                Ok(begun) => {
                    let (all, new) = (begun.text_bytes(), begun.uncached_bytes());
                    let tokenizer = Arc::clone(tokenizer);
                    let work = move || Ok((tokenizer.finish(begun)?, all, new));
                    if new <= MAX_BYTES_HERE { pool::here(work) } else { self.pool.run(work).await }
                }
                Err(failure) => Err(failure),
            }
        };
        match tokens {
            Ok((tokens, all, new)) => {
                self.meters.cached_bytes.increment((all - new) as u64);
                self.meters.computed_bytes.increment(new as u64);
                self.meters.cache.set(self.runs.bytes() as f64);
                Some(tokens)
            }
            Err(failure) => {
                counter!("dynamo_host_tokenize_failures_total", "cause" => failure.label()).increment(1);
                // A prompt's fault may be any client's, and a host that is busy is so for many.
                if matches!(failure, NotComputed::Prompt(_)) || self.was_told.swap(true, Relaxed) {
                    tracing::debug!("the tokens of a prompt are approximate: {}", plain(&failure.to_string()));
                } else {
                    tracing::warn!("the tokens of a prompt, and of more from now on, are approximate: {failure}");
                }
                None
            }
        }
    }

    /// Whether one has failed lately.
    fn engines_rest(&self) -> bool {
        self.begun.elapsed().as_millis() < u128::from(self.rest_until_ms.load(Relaxed))
    }

    /// Asks one of the engines that may serve the request.
    async fn by_engine(
        &self,
        facts: &RequestFacts,
        body: &Bytes,
        snapshot: &Snapshot,
        was_told: &AtomicBool,
    ) -> Option<PromptTokens> {
        // Engines tell of images as placeholders, which are alike.
        if facts.multimodal_items > 0 || body.len() > MAX_BODY_FOR_ENGINE || self.engines_rest() {
            return None;
        }
        let candidates = snapshot.candidates(facts).ok()?;
        // Another one each time; any will do.
        let row = (facts.prefix_key ^ facts.accepted_ms) % u64::from(candidates.count());
        let engine = snapshot.engine(candidates.worker(row as u32).id);
        let answer = tokio::time::timeout(ENGINE_TIMEOUT, engine.tokenize(facts.endpoint, body.clone())).await;
        let reason = match answer {
            Ok(Ok(Some(ids))) => return Some(PromptTokens { ids: ids.into(), is_exact: true }),
            // It does not tell the tokens of such a request.
            Ok(Ok(None)) => return None,
            Ok(Err(error)) => plain(&error.to_string()),
            Err(_) => format!("it did not answer within {} ms", ENGINE_TIMEOUT.as_millis()),
        };
        self.rest_until_ms.store((self.begun.elapsed() + ENGINE_REST).as_millis() as u64, Relaxed);
        counter!("dynamo_host_tokenize_failures_total", "cause" => "engine").increment(1);
        if !was_told.swap(true, Relaxed) {
            tracing::warn!(model = facts.model, "an engine that was asked for tokens failed, and more may: {reason}");
        }
        None
    }
}

/// Reads tokenizers as [`Tokenizing::load`] does, only to say which cannot be.
pub(crate) fn check(sources: &BTreeMap<String, TokenizerSource>) -> Vec<(&str, TokenizerError)> {
    let runs = RunCache::new(0);
    sources
        .iter()
        .filter_map(|(name, source)| match source {
            TokenizerSource::Directory(path) => Some((name.as_str(), Tokenizer::load(path, Arc::clone(&runs)).err()?)),
            TokenizerSource::Engine => None,
        })
        .collect()
}

impl How {
    fn new(how: &'static str) -> Self {
        Self {
            prompts: counter!("dynamo_host_prompts_tokenized_total", "how" => how),
            tokens: counter!("dynamo_host_prompts_tokenized_tokens_total", "how" => how),
        }
    }
}

impl Meters {
    fn new() -> Self {
        let bytes = |from: &'static str| counter!("dynamo_host_tokenize_text_bytes_total", "from" => from);
        Self {
            tokenizer: How::new("tokenizer"),
            engine: How::new("engine"),
            given: How::new("given"),
            approximate: How::new("approximate"),
            cached_bytes: bytes("cache"),
            computed_bytes: bytes("tokenizer"),
            cache: gauge!("dynamo_host_token_cache_bytes"),
        }
    }
}
