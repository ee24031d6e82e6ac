//! Token bucket: so many requests and so many tokens a minute, for each tenant or whatever else clients are told apart by.
//!
//! Buckets are the host's (`state.take`): one for each client, whichever instance or version of the policy asks, so that
//! limits hold over all of them and over a swap. A request takes from all of its buckets or from none: what one gave is given
//! back where another refuses. Tokens are those of the prompt and those that the answer is expected to have; the true
//! number is not known before it is there, and is not charged later.

use std::{collections::BTreeMap, time::Duration};

use dynamo_policy_sdk::{
    Admission, Pools, Request, UNKNOWN, Verdict,
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
    state::{self, Taken},
    telemetry,
};

/// The largest rate or burst: counted as floats, one is not lost yet.
const MAX_AMOUNT: f64 = 1e12;

/// What an operator can set.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// Requests a minute of one client; without it there is no limit.
    pub requests_per_minute: Option<f64>,
    /// Tokens a minute of one client, prompt and answer; without it there is no limit.
    pub tokens_per_minute: Option<f64>,
    /// Requests that may come at once; a minute's by default.
    pub request_burst: Option<f64>,
    /// Tokens that may come at once; a minute's by default. No single request may be larger.
    pub token_burst: Option<f64>,
    /// What clients are told apart by: `tenant`, `session`, `all` (one bucket for everybody), or `attribute:NAME`, such as
    /// an allowed header.
    pub per: String,
    /// Whether the tokens of the answer count, as many as are expected.
    pub count_output: bool,
    /// Tokens of an answer of which nothing is known.
    pub output_tokens: u32,
    /// Limits of single tenants by their names, instead of those above.
    pub tenants: BTreeMap<String, Limits>,
}

/// Limits of one client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Limits {
    /// Requests a minute; without it there is no limit.
    pub requests_per_minute: Option<f64>,
    /// Tokens a minute; without it there is no limit.
    pub tokens_per_minute: Option<f64>,
    /// Requests that may come at once; a minute's by default.
    pub request_burst: Option<f64>,
    /// Tokens that may come at once; a minute's by default.
    pub token_burst: Option<f64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            requests_per_minute: None,
            tokens_per_minute: None,
            request_burst: None,
            token_burst: None,
            per: "tenant".to_owned(),
            count_output: true,
            output_tokens: 256,
            tenants: BTreeMap::new(),
        }
    }
}

/// What clients are told apart by.
enum Per {
    Tenant,
    Session,
    All,
    Attribute(String),
}

/// The policy.
pub struct TokenBucket {
    per: Per,
    limits: Limits,
    tenants: BTreeMap<String, Limits>,
    /// Tokens of an answer of which nothing is known; `None`: answers do not count.
    output_tokens: Option<u32>,
}

/// One bucket that a request takes from.
struct Bucket {
    key: String,
    /// Of what, for the client.
    of: &'static str,
    amount: f64,
    per_second: f64,
    burst: f64,
}

impl Admission for TokenBucket {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        let Settings { requests_per_minute, tokens_per_minute, request_burst, token_burst, .. } = settings;
        let limits = Limits { requests_per_minute, tokens_per_minute, request_burst, token_burst };
        limits.check("")?;
        for (tenant, limits) in &settings.tenants {
            limits.check(&format!("tenants.{tenant}."))?;
        }
        let per = match settings.per.as_str() {
            "tenant" => Per::Tenant,
            "session" => Per::Session,
            "all" => Per::All,
            other => match other.strip_prefix("attribute:") {
                Some(name) if !name.is_empty() => Per::Attribute(name.to_owned()),
                _ => return Err(format!("per is {other:?}; use tenant, session, all or attribute:NAME")),
            },
        };
        let output_tokens = settings.count_output.then_some(settings.output_tokens);
        Ok(Self { per, limits, tenants: settings.tenants, output_tokens })
    }

    fn admit(&self, request: &Request, _: &Pools) -> Verdict {
        match take_all(&self.buckets(request)) {
            Ok(()) => Verdict::admit().into(),
            Err(refused) => refused.verdict(),
        }
    }
}

impl TokenBucket {
    /// The buckets of a request, one for each limit that there is.
    fn buckets(&self, request: &Request) -> Vec<Bucket> {
        let limits = self.limits_of(request);
        let client = self.client(request);
        let bucket = |of, per_minute: Option<f64>, burst: Option<f64>, amount: &dyn Fn() -> f64| {
            let per_minute = per_minute?;
            let (key, amount) = ([of, ".", &client].concat(), amount());
            Some(Bucket { key, of, amount, per_second: per_minute / 60.0, burst: burst.unwrap_or(per_minute) })
        };
        let requests = bucket("requests", limits.requests_per_minute, limits.request_burst, &|| 1.0);
        let tokens = bucket("tokens", limits.tokens_per_minute, limits.token_burst, &|| self.tokens(request));
        [requests, tokens].into_iter().flatten().collect()
    }

    fn limits_of(&self, request: &Request) -> Limits {
        if self.tenants.is_empty() {
            return self.limits;
        }
        request.tenant().and_then(|tenant| self.tenants.get(tenant)).copied().unwrap_or(self.limits)
    }

    /// Those who cannot be told apart share a bucket.
    fn client(&self, request: &Request) -> String {
        let key = |key: Option<u64>| key.map_or_else(|| "nobody".to_owned(), hex);
        match &self.per {
            Per::Tenant => key(request.tenant_key()),
            Per::Session => key(request.session_key()),
            Per::All => "all".to_owned(),
            Per::Attribute(name) => key(request.attribute(name).map(|value| hash(&value))),
        }
    }

    fn tokens(&self, request: &Request) -> f64 {
        let answer = self.output_tokens.map_or(0, |unknown| {
            let known = [request.expected_output_tokens(), request.max_output_tokens()];
            known.into_iter().find(|&tokens| tokens != UNKNOWN).unwrap_or(unknown)
        });
        f64::from(request.prompt_tokens()) + f64::from(answer) * f64::from(request.choices())
    }
}

impl Limits {
    fn check(&self, of: &str) -> Result<(), String> {
        let Self { requests_per_minute, tokens_per_minute, request_burst, token_burst } = *self;
        for (key, value) in [
            ("requests_per_minute", requests_per_minute),
            ("tokens_per_minute", tokens_per_minute),
            ("request_burst", request_burst),
            ("token_burst", token_burst),
        ] {
            if let Some(value) = value.filter(|value| !(0.0..=MAX_AMOUNT).contains(value)) {
                return Err(format!("{of}{key} is {value}; use a number from 0 to {MAX_AMOUNT}"));
            }
        }
        for (burst, rate) in [("request_burst", "requests_per_minute"), ("token_burst", "tokens_per_minute")] {
            let (has_burst, has_rate) = match burst {
                "request_burst" => (request_burst.is_some(), requests_per_minute.is_some()),
                _ => (token_burst.is_some(), tokens_per_minute.is_some()),
            };
            if has_burst && !has_rate {
                return Err(format!("{of}{burst} is set without {of}{rate}; set both"));
            }
        }
        Ok(())
    }
}

/// Why a request is refused.
struct Refused<'a> {
    /// The bucket that takes longest.
    bucket: &'a Bucket,
    /// `None`: never.
    retry_after: Option<Duration>,
}

impl Refused<'_> {
    fn verdict(&self) -> Verdict {
        let Bucket { of, amount, per_second, burst, .. } = self.bucket;
        let per_minute = per_second * 60.0;
        match self.retry_after {
            Some(after) => {
                Verdict::shed(429, format!("the limit of {per_minute} {of} per minute is reached")).retry_after(after).into()
            }
            None => Verdict::shed(
                429,
                format!("the request counts {amount} {of}, and at most {burst} may come at once; make it smaller"),
            )
            .into(),
        }
    }
}

/// Takes from all buckets, or from none. All are asked in any case: who is refused is told how long the slowest takes.
fn take_all(buckets: &[Bucket]) -> Result<(), Refused<'_>> {
    let mut refused: Option<Refused<'_>> = None;
    let mut taken = Vec::new();
    for bucket in buckets {
        let retry_after = match state::take(&bucket.key, bucket.amount, bucket.per_second, bucket.burst) {
            Ok(Taken::Remaining(_)) => {
                taken.push(bucket);
                continue;
            }
            Ok(Taken::RetryAfter(after)) => Some(after),
            Ok(Taken::Never) => None,
            // No bucket can be kept: the request is not at fault.
            Err(_) => {
                telemetry::counter_add("buckets_not_kept", 1);
                continue;
            }
        };
        let is_longer = refused.as_ref().is_none_or(|known| match (known.retry_after, retry_after) {
            (Some(known), Some(this)) => this > known,
            (known, _) => known.is_some(),
        });
        if is_longer {
            refused = Some(Refused { bucket, retry_after });
        }
    }
    let Some(refused) = refused else { return Ok(()) };
    for bucket in taken {
        let _ = state::give_back(&bucket.key, bucket.amount, bucket.per_second, bucket.burst);
    }
    Err(refused)
}

/// Sixteen digits; `format!` takes longer than all else that a request costs here.
fn hex(key: u64) -> String {
    (0..16).rev().map(|digit| char::from(b"0123456789abcdef"[(key >> (4 * digit)) as usize & 15])).collect()
}

/// FNV-1a: an attribute of any length becomes a key.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

dynamo_policy_sdk::register!(TokenBucket as Admission);

#[cfg(test)]
mod tests;
