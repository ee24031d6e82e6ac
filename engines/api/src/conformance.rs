//! The suite that every engine adapter passes, against whatever engine its fixture brings: a model of one in a unit
//! test, a real one where there is one.
//!
//! Contract: checks run one after another, each within [`Fixture::patience`]; none sleeps for a fixed time. All of
//! them run, whatever fails. What an engine cannot do is said by its [`Capabilities`] and reported as not applicable,
//! so that a table of adapters can be made of [`Report`]s. Checks send short prompts and little work, apart from the
//! two cancellation checks.

mod ask;
mod checks;
mod endpoints;
mod handoff;
mod load;

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use futures_core::future::BoxFuture;
use tokio::time::timeout;

use crate::{Endpoint, Engine};

/// What the suite needs to know of an engine under test.
pub trait Fixture: Sync {
    /// The adapter, connected to its engine.
    fn engine(&self) -> Arc<dyn Engine>;

    /// A model that the engine serves.
    fn model(&self) -> &str;

    /// Requests that the engine works on now, by its own account; none if it cannot tell, and then cancellation is not
    /// checked.
    fn running(&self) -> impl Future<Output = Option<u32>> + Send;

    /// The same adapter for an address where nobody listens (see [`closed_port`]); none if it has no address.
    fn dead_engine(&self) -> Option<Arc<dyn Engine>> {
        None
    }

    /// The adapters of two such engines, the first of which prefills what the second decodes, once both have been probed; none
    /// if there is no pair.
    fn pair(&self) -> Option<(Arc<dyn Engine>, Arc<dyn Engine>)> {
        None
    }

    /// What the engine can do.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    /// Output tokens that keep the engine busy for several times [`Self::cancels_within`], and that it accepts.
    fn long_output_tokens(&self) -> u32 {
        2048
    }

    /// How soon the engine stops working on a request whose reply was dropped. SGLang needs over 2 s.
    fn cancels_within(&self) -> Duration {
        Duration::from_secs(1)
    }

    /// Longest time that a check may take.
    fn patience(&self) -> Duration {
        Duration::from_secs(30)
    }
}

/// What an engine can do. By default all of chats and completions, of which an engine's fixture takes away what it cannot, for
/// the reason given; and nothing beyond them, to which the fixture adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// It lists its models (`transformers serve` needs the network for that).
    pub lists_models: bool,
    /// A prompt may be a list of token ids.
    pub token_id_prompts: bool,
    /// It reports token counts at the end of a stream.
    pub stream_usage: bool,
    /// It ignores fields that it does not know (TensorRT-LLM refuses them).
    pub unknown_fields: bool,
    /// It refuses a model that it does not serve (llama.cpp ignores the name).
    pub refuses_unknown_model: bool,
    /// At temperature 0 it answers the same request in the same way while there is no other.
    pub deterministic: bool,
    /// It stops working on an unstreamed request whose client left (llama.cpp does not).
    pub cancels_whole: bool,
    /// It refuses with `{"error": {"message": …}}` (SGLang and TensorRT-LLM have the message elsewhere).
    pub error_objects: bool,
    /// It tells its load.
    pub reports_load: bool,
    /// What it answers apart from chats and completions.
    pub offers: &'static [Endpoint],
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            lists_models: true,
            token_id_prompts: true,
            stream_usage: true,
            unknown_fields: true,
            refuses_unknown_model: true,
            deterministic: true,
            cancels_whole: true,
            error_objects: true,
            reports_load: false,
            offers: &[],
        }
    }
}

/// What became of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Passed,
    /// What was seen instead.
    Failed(String),
    /// Why it does not concern this engine.
    NotApplicable(&'static str),
}

/// A check and its verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What is checked, as a statement that should be true.
    pub check: &'static str,
    /// What became of it.
    pub verdict: Verdict,
}

/// What became of all checks, in order. It displays as a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The adapter's kind.
    pub adapter: &'static str,
    /// Check by check.
    pub outcomes: Vec<Outcome>,
}

impl Report {
    /// Checks that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Outcome> {
        self.outcomes.iter().filter(|outcome| matches!(outcome.verdict, Verdict::Failed(_)))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "adapter {}:", self.adapter)?;
        for Outcome { check, verdict } in &self.outcomes {
            match verdict {
                Verdict::Passed => writeln!(out, "  passed  {check}")?,
                Verdict::Failed(seen) => writeln!(out, "  FAILED  {check}: {seen}")?,
                Verdict::NotApplicable(why) => writeln!(out, "  n/a     {check}: {why}")?,
            }
        }
        Ok(())
    }
}

/// Runs all checks.
///
/// # Panics
/// If some fail, with the whole report.
pub async fn assert_conforms(fixture: &impl Fixture) {
    let report = run(fixture).await;
    assert!(report.failures().next().is_none(), "the adapter does not conform\n{report}");
}

/// Runs all checks.
pub async fn run(fixture: &impl Fixture) -> Report {
    let on = ask::Asking::new(fixture);
    let checks: Vec<(&'static str, BoxFuture<'_, checks::Checked>)> = vec![
        ("it lists its model", Box::pin(checks::lists_its_model(&on))),
        ("a probe finds it alive", Box::pin(checks::a_probe_finds_it_alive(&on))),
        ("a chat is answered whole", Box::pin(checks::a_chat_is_answered_whole(&on))),
        ("a chat is streamed completely, in order, with one role", Box::pin(checks::a_chat_is_streamed(&on))),
        ("a completion is answered whole", Box::pin(checks::a_completion_is_answered_whole(&on))),
        ("a completion is streamed completely and in order", Box::pin(checks::a_completion_is_streamed(&on))),
        ("each chunk is whole server-sent events", Box::pin(checks::each_chunk_is_whole_events(&on))),
        ("a prompt of token ids is taken as it is", Box::pin(checks::a_prompt_of_token_ids_is_taken(&on))),
        ("a stream reports its usage when asked", Box::pin(checks::a_stream_reports_its_usage(&on))),
        ("a field that nobody knows passes", Box::pin(checks::an_unknown_field_passes(&on))),
        ("embeddings are answered", Box::pin(endpoints::embeddings_are_answered(&on))),
        ("a message of Anthropic's API is answered whole", Box::pin(endpoints::a_message_is_answered_whole(&on))),
        ("tokens are counted in Anthropic's API", Box::pin(endpoints::tokens_are_counted(&on))),
        ("a response of OpenAI's newer API is answered whole", Box::pin(endpoints::a_response_is_answered_whole(&on))),
        ("it tells its load, rank by rank", Box::pin(load::it_tells_its_load(&on))),
        ("a stream shows in its load, and is gone after it", Box::pin(load::a_stream_shows_in_its_load(&on))),
        ("a chat is handed over, and says what it says whole", Box::pin(handoff::a_chat_is_handed_over(&on))),
        ("a completion is handed over, and says what it says whole", Box::pin(handoff::a_completion_is_handed_over(&on))),
        ("hand-offs at once do not meet each other", Box::pin(handoff::hand_offs_at_once_do_not_meet(&on))),
        ("a prefill that left nothing is told from one that did", Box::pin(handoff::nothing_left_is_told(&on))),
        ("an unknown model is a 404 with an error object", Box::pin(checks::an_unknown_model_is_refused(&on))),
        ("a malformed body is refused with a message", Box::pin(checks::a_malformed_body_is_refused(&on))),
        ("16 streams at once are each complete", Box::pin(checks::streams_at_once_are_complete(&on))),
        ("dropping a stream ends its work", Box::pin(checks::dropping_a_stream_ends_its_work(&on))),
        ("dropping the wait for an answer ends its work", Box::pin(checks::dropping_a_wait_ends_its_work(&on))),
        ("a dead engine is a failed connect", Box::pin(checks::a_dead_engine_is_a_failed_connect(&on))),
    ];
    let mut outcomes = Vec::with_capacity(checks.len());
    for (check, checked) in checks {
        let patience = fixture.patience();
        let verdict = match timeout(patience, checked).await {
            Ok(Ok(())) => Verdict::Passed,
            Ok(Err(verdict)) => verdict,
            Err(_) => Verdict::Failed(format!("not done within {} ms", patience.as_millis())),
        };
        outcomes.push(Outcome { check, verdict });
    }
    Report { adapter: fixture.engine().kind(), outcomes }
}

/// A local address where nobody listens: a port that was free a moment ago.
///
/// # Errors
/// If the system has no free port.
pub fn closed_port() -> io::Result<SocketAddr> {
    std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()
}

#[cfg(test)]
mod tests;
