//! Load without regard for how it is borne: requests that come when they come, whoever is still waiting, each with its outcome.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    time::Duration,
};

use http_body_util::BodyExt as _;
use hyper::{Method, header::CONTENT_TYPE};
use serde_json::Value;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{
    client::{Client, header},
    sse::Events,
};

/// Requests of one kind that keep coming.
#[derive(Clone)]
pub(crate) struct Source {
    pub(crate) client: Client,
    pub(crate) headers: Vec<(&'static str, String)>,
    /// Requests each second, on average.
    pub(crate) rate: f64,
    /// What is asked, each in turn; streams, with their usage.
    pub(crate) bodies: Vec<String>,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// Served to its end.
    Served { ttft: Duration, tokens: u64 },
    /// Refused, in the API's shape.
    Refused { status: u16, code: String, retry_after: Option<u64> },
    /// Anything else: no answer, one that is cut, an error within a stream.
    Failed(String),
}

/// One request's end.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) source: usize,
    pub(crate) ended: Instant,
    pub(crate) queue_ms: Option<f64>,
    pub(crate) outcome: Outcome,
}

/// Sends from all sources for so long, and waits for all answers.
pub(crate) async fn send(sources: &[Source], seed: u64, how_long: Duration) -> Vec<Sample> {
    let (begin, mut senders) = (Instant::now(), JoinSet::new());
    for (number, source) in sources.iter().cloned().enumerate() {
        let seed = seed.wrapping_add(number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        senders.spawn(send_from(number, source, Chance(seed), begin, how_long));
    }
    let mut samples = Vec::new();
    while let Some(sent) = senders.join_next().await {
        samples.extend(sent.expect("a sender does not panic"));
    }
    samples
}

/// Sends when it is time, not when there is an answer.
async fn send_from(number: usize, source: Source, mut chance: Chance, begin: Instant, how_long: Duration) -> Vec<Sample> {
    let mut pending = JoinSet::new();
    let mut next = begin;
    for turn in 0.. {
        // Poisson: the next does not know of the last.
        next += Duration::from_secs_f64(-chance.next().ln() / source.rate);
        if next >= begin + how_long {
            break;
        }
        sleep_until(next).await;
        let (client, headers) = (source.client.clone(), source.headers.clone());
        let body = source.bodies[turn % source.bodies.len()].clone();
        pending.spawn(async move { ask(number, &client, &headers, body).await });
    }
    let mut samples = Vec::new();
    while let Some(sample) = pending.join_next().await {
        samples.push(sample.expect("a request does not panic"));
    }
    samples
}

async fn ask(source: usize, client: &Client, headers: &[(&'static str, String)], body: String) -> Sample {
    let sent = Instant::now();
    let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut queue_ms = None;
    let outcome = match client.try_send(Method::POST, "/v1/chat/completions", &headers, body).await {
        Err(error) => Outcome::Failed(error),
        Ok(reply) => {
            queue_ms = header(reply.headers(), "x-dynamo-queue-ms").parse().ok();
            let is_stream = header(reply.headers(), CONTENT_TYPE.as_str()).starts_with("text/event-stream");
            if reply.status().is_success() && is_stream {
                read_stream(Events::new(reply), sent).await
            } else {
                let status = reply.status().as_u16();
                let retry_after = header(reply.headers(), "retry-after").parse().ok();
                let body = reply.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
                let code =
                    serde_json::from_slice(&body).ok().and_then(|body: Value| Some(body["error"]["code"].as_str()?.to_owned()));
                match code {
                    Some(code) => Outcome::Refused { status, code, retry_after },
                    None => Outcome::Failed(format!("{status}: {}", String::from_utf8_lossy(&body))),
                }
            }
        }
    };
    Sample { source, ended: Instant::now(), queue_ms, outcome }
}

async fn read_stream(mut events: Events, sent: Instant) -> Outcome {
    let (mut ttft, mut tokens) = (None, None);
    loop {
        let data = match events.next().await {
            Ok(Some(data)) => data,
            Ok(None) => return Outcome::Failed("a stream that ended without [DONE]".to_owned()),
            Err(error) => return Outcome::Failed(error),
        };
        if data == "[DONE]" {
            break;
        }
        ttft.get_or_insert(sent.elapsed());
        let event: Value = serde_json::from_str(&data).unwrap_or_default();
        if !event["error"].is_null() {
            return Outcome::Failed(data);
        }
        tokens = event["usage"]["total_tokens"].as_u64().or(tokens);
    }
    match (ttft, tokens) {
        (Some(ttft), Some(tokens)) => Outcome::Served { ttft, tokens },
        _ => Outcome::Failed("a stream without tokens or usage".to_owned()),
    }
}

/// Numbers by chance, the same for each seed: xorshift64*.
struct Chance(u64);

impl Chance {
    /// More than 0, and at most 1.
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 + 1.0) / (1_u64 << 53) as f64
    }
}

/// What became of one source's requests.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) sent: usize,
    pub(crate) served: usize,
    /// By status and code.
    pub(crate) refused: BTreeMap<(u16, String), usize>,
    pub(crate) failed: Vec<String>,
    /// Tokens of those that were served within the window.
    pub(crate) tokens: u64,
    pub(crate) ttft: Vec<Duration>,
    pub(crate) queue_ms: Vec<f64>,
}

impl Tally {
    /// Of one source's samples; tokens and latencies of those only that ended within the window.
    pub(crate) fn of(samples: &[Sample], source: usize, window: [Instant; 2]) -> Self {
        let mut tally = Self::default();
        for sample in samples.iter().filter(|sample| sample.source == source) {
            tally.sent += 1;
            match &sample.outcome {
                Outcome::Served { ttft, tokens } => {
                    tally.served += 1;
                    if (window[0]..window[1]).contains(&sample.ended) {
                        tally.tokens += tokens;
                        tally.ttft.push(*ttft);
                        tally.queue_ms.extend(sample.queue_ms);
                    }
                }
                Outcome::Refused { status, code, .. } => *tally.refused.entry((*status, code.clone())).or_default() += 1,
                Outcome::Failed(reason) => tally.failed.push(reason.clone()),
            }
        }
        tally.ttft.sort_unstable();
        tally.queue_ms.sort_unstable_by(f64::total_cmp);
        tally
    }

    pub(crate) fn ttft(&self, share: f64) -> Duration {
        at(&self.ttft, share).unwrap_or_default()
    }

    pub(crate) fn refused(&self) -> usize {
        self.refused.values().sum()
    }
}

/// The value at a share of a sorted list.
fn at<T: Copy>(sorted: &[T], share: f64) -> Option<T> {
    let last = sorted.len().checked_sub(1)?;
    Some(sorted[(share * last as f64).round() as usize])
}

impl Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p99] = [0.5, 0.99].map(|share| self.ttft(share).as_secs_f64() * 1000.0);
        let queue = at(&self.queue_ms, 0.5).unwrap_or_default();
        write!(
            f,
            "{:>6} {:>6} {:>7} {:>6} {:>8} {p50:>8.0} {p99:>8.0} {queue:>8.0}",
            self.sent,
            self.served,
            self.refused(),
            self.failed.len(),
            self.tokens
        )
    }
}
