//! Events that say their type: OpenAI's responses and Anthropic's messages.
//!
//! Spec: <https://platform.openai.com/docs/api-reference/responses-streaming>,
//! <https://docs.anthropic.com/en/api/messages-streaming>

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Summary, Usage, error_message, is_something};

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    delta: Option<&'a RawValue>,
    #[serde(borrow, default)]
    response: Option<Response<'a>>,
    #[serde(default)]
    message: Option<Message>,
}

/// What `response.completed` and its kin tell of the whole.
#[derive(Deserialize)]
struct Response<'a> {
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

/// What `message_start` tells, or an error's words.
#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Text(String),
    Start { usage: Option<Usage> },
}

/// What `message_delta` tells.
#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow, default)]
    stop_reason: Option<&'a RawValue>,
}

/// Adds what one event says. What it holds under the names that all streams share is in `summary` already.
pub(super) fn add_to(data: &[u8], summary: &mut Summary) {
    let Ok(event) = serde_json::from_slice::<Event<'_>>(data) else { return };
    match (&*event.kind, event.message) {
        ("message_start", Some(Message::Start { usage })) => summary.usage = summary.usage.or(usage),
        ("message_delta", _) => {
            let stopped = event.delta.and_then(|delta| serde_json::from_str::<Delta<'_>>(delta.get()).ok());
            summary.finishes += u32::from(stopped.is_some_and(|delta| is_something(delta.stop_reason)));
        }
        ("message_stop", _) => summary.done = true,
        ("response.completed" | "response.incomplete", _) => {
            summary.finishes += 1;
            summary.done = true;
            summary.usage = event.response.and_then(|response| response.usage).or(summary.usage);
        }
        ("response.failed", _) => {
            let error = event.response.and_then(|response| response.error);
            summary.error = Some(error.map_or_else(|| "the response failed".to_owned(), |error| error_message(error.get())));
        }
        ("error", Some(Message::Text(text))) if summary.error.is_none() => summary.error = Some(text),
        // `content_block_delta`, `response.output_text.delta`, `response.function_call_arguments.delta`, …
        (kind, _) if kind.ends_with("delta") => summary.tokens += u32::from(is_something(event.delta)),
        _ => {}
    }
}
