//! Reply: an order's tokens as they come, made into the frames of a stream.
//!
//! Invariant: a chunk's summary is what reading its bytes would give.

use bytes::{BufMut, BytesMut};
use dynamo_engine_api::{
    Chunk, Endpoint, Summary,
    sse::{self, DONE_FRAME},
};
use serde::Serialize;
use serde_json::Value;

use super::{
    anthropic,
    order::Order,
    responses,
    shapes::{ChatDelta, Delta, Frame, PromptTokensDetails, TextDelta, Usage},
};
use crate::{driver::Output, model::FinishReason};

/// What engines call their build and configuration.
pub(super) const FINGERPRINT: &str = concat!("dynamo-mock-", env!("CARGO_PKG_VERSION"));

/// Renders one order's stream.
#[derive(Debug)]
pub(crate) struct Rendering {
    pub(super) order: Order,
    pub(super) id: String,
    pub(super) model: String,
    pub(super) created: u64,
    pub(super) counted: Counted,
    /// What was generated and not shown yet, by choice.
    unshown: Vec<Unshown>,
    /// The text that is shown with the latest token.
    pub(super) text: String,
    /// All that was shown and how it ended, where the end tells it again.
    said: String,
    finish: Option<FinishReason>,
    /// Events so far, where they are numbered.
    events: u64,
}

/// A choice's text that is held back.
#[derive(Clone, Debug, Default)]
struct Unshown {
    text: String,
    /// Bytes that were shown before it.
    shown_bytes: usize,
}

/// Tokens of a reply so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counted {
    pub(super) prompt: u32,
    pub(super) completion: u32,
    pub(super) cached: u32,
}

impl Rendering {
    /// `request_id` becomes part of the reply's id; `created` is in seconds since 1970.
    pub(crate) fn new(order: Order, request_id: &str, model: &str, created: u64) -> Self {
        let prefix = match order.endpoint {
            Endpoint::ChatCompletions | Endpoint::Messages | Endpoint::CountTokens => "chatcmpl-",
            Endpoint::Completions => "cmpl-",
            Endpoint::Embeddings => "embd-",
            Endpoint::Responses => "resp_",
        };
        let prompt = order.choices.iter().step_by(order.n).map(|choice| choice.prompt.len() as u32).sum();
        Self {
            id: format!("{prefix}{request_id}"),
            model: model.to_owned(),
            created,
            counted: Counted { prompt, ..Counted::default() },
            unshown: vec![Unshown::default(); order.choices.len()],
            text: String::new(),
            said: String::new(),
            finish: None,
            events: 0,
            order,
        }
    }

    /// The frames that tell of a token: its own, before the first of a chat also that of the role.
    pub(crate) fn token(&mut self, output: Output) -> Chunk {
        self.count(output);
        let mut bytes = BytesMut::with_capacity(320);
        let shown = self.show(output);
        match self.order.endpoint {
            Endpoint::ChatCompletions => self.chat_token(output, shown, &mut bytes),
            Endpoint::Messages | Endpoint::Responses => return self.named_token(output, shown, bytes),
            _ => self.completion_token(output, shown, &mut bytes),
        }
        let summary = Summary {
            tokens: u32::from(shown > 0 || self.order.return_token_ids),
            finishes: u32::from(output.finish.is_some()),
            usage: self.order.continuous_usage.then(|| self.api_usage(None)),
            ..Summary::default()
        };
        Chunk { bytes: bytes.freeze(), summary }
    }

    /// The frames after the last token.
    pub(crate) fn end(&mut self) -> Chunk {
        let mut bytes = BytesMut::with_capacity(320);
        let last = match self.order.endpoint {
            Endpoint::Messages => Some(anthropic::end()),
            Endpoint::Responses => Some(responses::end(self, &self.said, self.finish)),
            _ => None,
        };
        if let Some(last) = last {
            let details = sse::PromptTokensDetails { cached_tokens: Some(self.counted.cached) };
            let usage = (self.order.endpoint == Endpoint::Responses).then(|| self.api_usage(Some(details)));
            self.push_named(last, &mut bytes);
            return Chunk { bytes: bytes.freeze(), summary: Summary { done: true, usage, ..Summary::default() } };
        }
        if self.order.include_usage {
            let created_cache_tokens = self.is_chat().then_some(Some(0));
            let details =
                PromptTokensDetails { cached_tokens: self.counted.cached, created_cache_tokens, multimodal_tokens: None };
            let usage = Usage { prompt_tokens_details: Some(details), completion_tokens_details: None, ..self.usage() };
            let fingerprint = Some(FINGERPRINT);
            push_frame(&mut bytes, &Frame { usage: Some(usage), system_fingerprint: fingerprint, ..self.frame::<()>(&[]) });
        }
        bytes.put_slice(DONE_FRAME);
        let details = sse::PromptTokensDetails { cached_tokens: Some(self.counted.cached) };
        let usage = self.order.include_usage.then(|| self.api_usage(Some(details)));
        Chunk { bytes: bytes.freeze(), summary: Summary { done: true, usage, ..Summary::default() } }
    }

    pub(super) fn count(&mut self, output: Output) {
        self.counted.completion += 1;
        if output.index == 0 && (output.sequence as usize).is_multiple_of(self.order.n) {
            self.counted.cached += output.cached_tokens;
        }
    }

    /// Puts the text that is shown with a token into `self.text` and returns its length. It ends before a stop string, and
    /// until the choice ends, before what may be the beginning of one.
    pub(super) fn show(&mut self, output: Output) -> usize {
        let choice = &self.order.choices[output.sequence as usize];
        let unshown = &mut self.unshown[output.sequence as usize];
        self.order.script.push_text(choice.first + output.index, &mut unshown.text);
        let held = if output.finish.is_some() { 0 } else { choice.held_bytes };
        let room = choice.shown_bytes.saturating_sub(unshown.shown_bytes);
        let shown = unshown.text.floor_char_boundary(unshown.text.len().saturating_sub(held).min(room));
        self.text.clear();
        self.text.extend(unshown.text.drain(..shown));
        unshown.shown_bytes += shown;
        shown
    }

    /// The token's events where events have names, as those of messages and responses do.
    fn named_token(&mut self, output: Output, shown: usize, mut bytes: BytesMut) -> Chunk {
        self.said.push_str(&self.text[..shown]);
        self.finish = output.finish.or(self.finish);
        let is_message = self.order.endpoint == Endpoint::Messages;
        let events =
            if is_message { anthropic::token(self, output, shown) } else { responses::token(self, output, shown, &self.said) };
        events.into_iter().for_each(|event| self.push_named(event, &mut bytes));
        let details = sse::PromptTokensDetails { cached_tokens: Some(self.counted.cached) };
        let summary = Summary {
            tokens: u32::from(shown > 0),
            finishes: u32::from(output.finish.is_some()),
            usage: (is_message && output.finish.is_some()).then(|| self.api_usage(Some(details))),
            ..Summary::default()
        };
        Chunk { bytes: bytes.freeze(), summary }
    }

    fn push_named(&mut self, mut event: Value, bytes: &mut BytesMut) {
        if self.order.endpoint == Endpoint::Responses {
            event["sequence_number"] = self.events.into();
            self.events += 1;
        }
        let name = event["type"].as_str().unwrap_or_default();
        bytes.put_slice(format!("event: {name}\n").as_bytes());
        push_frame(bytes, &event);
    }

    fn chat_token(&self, output: Output, shown: usize, bytes: &mut BytesMut) {
        let choice = &self.order.choices[output.sequence as usize];
        if output.index == 0 {
            let delta = Delta { role: Some("assistant"), content: "" };
            let role = ChatDelta {
                index: output.sequence,
                delta,
                logprobs: (),
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
            };
            let prompt_token_ids = Some(self.order.return_token_ids.then_some(&*choice.prompt));
            let usage =
                self.frame_usage().map(|usage| Usage { total_tokens: usage.prompt_tokens, completion_tokens: 0, ..usage });
            push_frame(bytes, &Frame { usage, prompt_token_ids, prompt_text: Some(None), ..self.frame(&[role]) });
        }
        let delta = ChatDelta {
            index: output.sequence,
            delta: Delta { role: None, content: &self.text[..shown] },
            logprobs: (),
            finish_reason: output.finish.map(FinishReason::as_str),
            stop_reason: output.finish.map(|_| choice.stop_reason.as_deref()),
            token_ids: Some(self.order.return_token_ids.then_some([output.token])),
        };
        push_frame(bytes, &Frame { usage: self.frame_usage(), ..self.frame(&[delta]) });
    }

    fn completion_token(&self, output: Output, shown: usize, bytes: &mut BytesMut) {
        let choice = &self.order.choices[output.sequence as usize];
        let return_ids = self.order.return_token_ids;
        let delta = TextDelta {
            index: output.sequence,
            text: &self.text[..shown],
            logprobs: (),
            finish_reason: output.finish.map(FinishReason::as_str),
            stop_reason: output.finish.and(choice.stop_reason.as_deref()),
            prompt_token_ids: (return_ids && output.index == 0).then_some(&*choice.prompt),
            token_ids: return_ids.then_some([output.token]),
        };
        push_frame(bytes, &Frame { usage: self.frame_usage(), ..self.frame(&[delta]) });
    }

    fn frame<'a, C>(&'a self, choices: &'a [C]) -> Frame<'a, C> {
        Frame {
            id: &self.id,
            object: if self.is_chat() { "chat.completion.chunk" } else { "text_completion" },
            created: self.created,
            model: &self.model,
            choices,
            usage: None,
            system_fingerprint: None,
            prompt_token_ids: None,
            prompt_text: None,
        }
    }

    /// The usage so far, where every frame has it.
    fn frame_usage(&self) -> Option<Usage> {
        self.order.continuous_usage.then(|| self.usage())
    }

    pub(super) fn usage(&self) -> Usage {
        let Counted { prompt, completion, .. } = self.counted;
        Usage {
            prompt_tokens: prompt,
            total_tokens: prompt + completion,
            completion_tokens: completion,
            prompt_tokens_details: None,
            completion_tokens_details: Some(None),
        }
    }

    fn api_usage(&self, prompt_tokens_details: Option<sse::PromptTokensDetails>) -> sse::Usage {
        sse::Usage { prompt_tokens: self.counted.prompt, completion_tokens: self.counted.completion, prompt_tokens_details }
    }

    pub(super) fn is_chat(&self) -> bool {
        self.order.endpoint == Endpoint::ChatCompletions
    }
}

fn push_frame(bytes: &mut BytesMut, frame: &impl Serialize) {
    bytes.put_slice(b"data: ");
    serde_json::to_writer(bytes.writer(), frame).expect("numbers and strings serialize, and memory takes them");
    bytes.put_slice(b"\n\n");
}
