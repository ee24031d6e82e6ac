//! One request to a live engine, and several at once, with the times of their tokens.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_engine_api::{Endpoint, Engine, EngineError, GenerateRequest, Reply};
use futures_util::{StreamExt, future::join_all};
use serde_json::{Map, Value, json};

use crate::text::plain;

/// Token ids that prompts are made of: every vocabulary has them, and none of its special ones is among them by custom.
const IDS: std::ops::Range<u64> = 40..220;
/// Characters of a made-up word, which is about two tokens.
const WORD: usize = 5;

/// A stream that has ended.
pub(super) struct Stream {
    pub(super) asked: Instant,
    pub(super) first: Instant,
    /// When each chunk with tokens came, and how many it had.
    tokens: Vec<(Instant, u32)>,
    pub(super) prompt_tokens: u32,
    pub(super) cached_tokens: u32,
}

impl Stream {
    /// With the length of its prompt, where the engine did not tell it: as it was asked for, if that was in token ids.
    fn of(mut self, asked_tokens: u32, ids: bool) -> Result<Self, Refused> {
        if self.prompt_tokens == 0 {
            if !ids {
                let reason = "the engine takes no token ids and reports no usage, so that nobody knows how long prompts are; \
                              have it report usage in streams (stream_options.include_usage)";
                return Err(Refused::Failed(reason.to_owned()));
            }
            self.prompt_tokens = asked_tokens;
        }
        Ok(self)
    }
}

/// Asks an engine within bounds.
pub(super) struct Prober {
    engine: Arc<dyn Engine>,
    model: String,
    until: Instant,
    tokens_left: u64,
    random: u64,
    speaks: Speaks,
    /// Tokens of a made-up word, where prompts are text.
    tokens_per_word: f64,
    /// Whether a bound was reached.
    pub(super) is_cut: bool,
}

/// What the engine has been found to accept.
#[derive(Clone, Copy)]
struct Speaks {
    /// Prompts of token ids.
    ids: bool,
    /// `ignore_eos`, so that an answer is as long as it was asked to be.
    ignore_eos: bool,
}

impl Prober {
    pub(super) fn new(engine: Arc<dyn Engine>, model: String, until: Instant, tokens: u64) -> Self {
        let random = std::process::id() as u64 ^ crate::clock::unix_ms() << 20;
        let speaks = Speaks { ids: true, ignore_eos: true };
        Self { engine, model, until, tokens_left: tokens, random, speaks, tokens_per_word: 2.0, is_cut: false }
    }

    /// Finds out what the engine accepts, and has it warm.
    ///
    /// # Errors
    /// What it says to the plainest of requests; or that it says nothing within the bounds.
    pub(super) async fn settle(&mut self) -> Result<(), String> {
        let until = self.until;
        tokio::time::timeout_at(until.into(), self.try_all()).await.unwrap_or_else(|_| {
            Err("the engine did not complete a first, short request in time; see that it is well, or raise --max-seconds"
                .to_owned())
        })
    }

    async fn try_all(&mut self) -> Result<(), String> {
        let choices = [(true, true), (false, true), (true, false), (false, false)];
        let mut refusal = String::new();
        for (ids, ignore_eos) in choices {
            self.speaks = Speaks { ids, ignore_eos };
            match self.stream(64, 4).await {
                Ok(stream) => {
                    if !ids {
                        self.tokens_per_word = (f64::from(stream.prompt_tokens) / 32.0).max(0.1);
                    }
                    return Ok(());
                }
                Err(Refused::Answered(reason)) => refusal = reason,
                Err(Refused::Failed(reason)) => return Err(reason),
            }
        }
        Err(format!("the engine answers no completion: {refusal}"))
    }

    /// One request; `None` if it is beyond the bounds.
    pub(super) async fn ask(&mut self, prompt: u32, output: u32) -> Result<Option<Stream>, String> {
        if !self.take(u64::from(prompt + output)) {
            return Ok(None);
        }
        let until = self.until;
        match tokio::time::timeout_at(until.into(), self.stream(prompt, output)).await {
            Ok(asked) => asked.map(Some).map_err(Refused::into_reason),
            Err(_) => {
                self.is_cut = true;
                Ok(None)
            }
        }
    }

    /// Several at once.
    pub(super) async fn ask_together(&mut self, batch: u32, prompt: u32, output: u32) -> Result<Option<Vec<Stream>>, String> {
        if !self.take(u64::from(batch) * u64::from(prompt + output)) {
            return Ok(None);
        }
        let requests: Vec<_> = (0..batch).map(|_| self.request(prompt, output)).collect();
        let (engine, ids) = (&self.engine, self.speaks.ids);
        let all = join_all(requests.into_iter().map(|request| async move { stream(&**engine, request).await?.of(prompt, ids) }));
        match tokio::time::timeout_at(self.until.into(), all).await {
            Ok(streams) => streams.into_iter().collect::<Result<_, _>>().map(Some).map_err(Refused::into_reason),
            Err(_) => {
                self.is_cut = true;
                Ok(None)
            }
        }
    }

    fn take(&mut self, tokens: u64) -> bool {
        match self.tokens_left.checked_sub(tokens) {
            Some(left) if Instant::now() < self.until => {
                self.tokens_left = left;
                true
            }
            _ => {
                self.is_cut = true;
                false
            }
        }
    }

    async fn stream(&mut self, prompt: u32, output: u32) -> Result<Stream, Refused> {
        let request = self.request(prompt, output);
        stream(&*self.engine, request).await?.of(prompt, self.speaks.ids)
    }

    fn request(&mut self, prompt: u32, output: u32) -> GenerateRequest {
        let prompt: Value = if self.speaks.ids {
            (0..prompt).map(|_| IDS.start + self.next() % (IDS.end - IDS.start)).collect::<Vec<_>>().into()
        } else {
            let words = (f64::from(prompt) / self.tokens_per_word).round().max(1.0) as u32;
            (0..words).map(|_| self.word()).collect::<Vec<_>>().join(" ").into()
        };
        let mut body = Map::from_iter([
            ("model".to_owned(), self.model.clone().into()),
            ("prompt".to_owned(), prompt),
            ("max_tokens".to_owned(), output.into()),
            ("temperature".to_owned(), 0.into()),
            ("stream".to_owned(), true.into()),
            ("stream_options".to_owned(), json!({ "include_usage": true })),
        ]);
        if self.speaks.ignore_eos {
            body.insert("ignore_eos".to_owned(), true.into());
        }
        let id = format!("profile-{:016x}", self.next());
        GenerateRequest::new(Endpoint::Completions, Value::Object(body).to_string().into(), true, id.into())
    }

    fn word(&mut self) -> String {
        (0..WORD).map(|_| char::from(b'a' + (self.next() % 26) as u8)).collect()
    }

    /// Splitmix64 (Steele et al. 2014).
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

/// Why there is no stream.
enum Refused {
    /// The engine answered something else.
    Answered(String),
    /// It did not answer.
    Failed(String),
}

impl Refused {
    fn into_reason(self) -> String {
        match self {
            Self::Answered(reason) | Self::Failed(reason) => reason,
        }
    }
}

impl From<EngineError> for Refused {
    fn from(error: EngineError) -> Self {
        Self::Failed(plain(&error.to_string()))
    }
}

async fn stream(engine: &dyn Engine, request: GenerateRequest) -> Result<Stream, Refused> {
    let asked = Instant::now();
    let mut chunks = match engine.generate(request).await? {
        Reply::Stream(chunks) => chunks,
        Reply::Whole(reply) => {
            let body = plain(&String::from_utf8_lossy(&reply.body));
            return Err(Refused::Answered(format!("it answered {} with: {body}", reply.status)));
        }
    };
    let mut tokens = Vec::new();
    let mut usage = None;
    while let Some(chunk) = chunks.next().await {
        let summary = chunk?.summary;
        if summary.tokens > 0 {
            tokens.push((Instant::now(), summary.tokens));
        }
        usage = summary.usage.or(usage);
    }
    let Some(&(first, _)) = tokens.first() else {
        return Err(Refused::Answered("it answered without a token".to_owned()));
    };
    let usage = usage.unwrap_or_default();
    let cached_tokens = usage.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or(0);
    Ok(Stream { asked, first, tokens, prompt_tokens: usage.prompt_tokens, cached_tokens })
}

/// The most of them that decoded at once.
pub(super) fn overlap(streams: &[Stream]) -> u32 {
    let last = |stream: &Stream| stream.tokens.last().map_or(stream.first, |(at, _)| *at);
    let running = |at: Instant| streams.iter().filter(|stream| stream.first <= at && at <= last(stream)).count() as u32;
    streams.iter().map(|stream| running(stream.first)).max().unwrap_or(0)
}

/// Milliseconds of a step while all of them decode: the median of the intervals between tokens. `None`: they hardly did.
pub(super) fn step_ms(streams: &[Stream]) -> Option<f64> {
    let begin = streams.iter().map(|stream| stream.first).max()?;
    let end = streams.iter().filter_map(|stream| stream.tokens.last()).map(|(at, _)| *at).min()?;
    let mut intervals: Vec<Duration> = Vec::new();
    for stream in streams {
        let within = stream.tokens.windows(2).filter(|pair| pair[0].0 >= begin && pair[1].0 <= end);
        intervals.extend(within.map(|pair| (pair[1].0 - pair[0].0) / pair[1].1));
    }
    if intervals.len() < 4 {
        return None;
    }
    intervals.sort_unstable();
    Some(intervals[intervals.len() / 2].as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use dynamo_engine_api::ModelCard;
    use futures_util::future::{BoxFuture, pending};

    use super::*;

    /// An engine that accepts and says nothing.
    struct Silent;

    impl Engine for Silent {
        fn kind(&self) -> &'static str {
            "silent"
        }

        fn models(&self) -> BoxFuture<'_, Result<Vec<ModelCard>, EngineError>> {
            Box::pin(async { Ok(Vec::new()) })
        }

        fn probe(&self) -> BoxFuture<'_, Result<(), EngineError>> {
            Box::pin(async { Ok(()) })
        }

        fn generate(&self, _request: GenerateRequest) -> BoxFuture<'_, Result<Reply, EngineError>> {
            Box::pin(pending())
        }
    }

    #[tokio::test]
    async fn an_engine_that_says_nothing_is_not_waited_for_for_ever() {
        let mut prober = Prober::new(Arc::new(Silent), "m".to_owned(), Instant::now() + Duration::from_millis(20), 1000);
        assert!(prober.settle().await.unwrap_err().contains("did not complete a first, short request"));
    }

    #[test]
    fn a_length_that_is_not_told_is_the_one_asked_for_in_ids_and_unknown_in_text() {
        let stream = |prompt_tokens| {
            let now = Instant::now();
            Stream { asked: now, first: now, tokens: Vec::new(), prompt_tokens, cached_tokens: 0 }
        };
        let length = |prompt_tokens, ids| stream(prompt_tokens).of(64, ids).map(|stream| stream.prompt_tokens).ok();
        assert_eq!([length(0, true), length(65, true), length(70, false)], [Some(64), Some(65), Some(70)]);
        assert!(matches!(stream(0).of(64, false), Err(Refused::Failed(reason)) if reason.contains("reports no usage")));
    }
}
