//! Reply: an order's tokens as they come, made into the frames of a stream.
//!
//! Invariant: a chunk's summary is what reading its bytes would give.

use bytes::{BufMut, BytesMut};
use dynamo_engine_api::{
    Chunk, Endpoint, Summary,
    sse::{self, DONE_FRAME},
};
use serde::Serialize;

use super::{
    order::Order,
    shapes::{ChatDelta, Delta, Frame, PromptTokensDetails, TextDelta, Usage},
};
use crate::{driver::Output, model::FinishReason, tokens};

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
    /// Bytes of output text so far, by choice.
    text_bytes: Vec<usize>,
    /// Text of the latest token.
    pub(super) text: String,
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
        let prefix = if order.endpoint == Endpoint::ChatCompletions { "chatcmpl-" } else { "cmpl-" };
        let prompt = order.choices.iter().step_by(order.n).map(|choice| choice.prompt.len() as u32).sum();
        Self {
            id: format!("{prefix}{request_id}"),
            model: model.to_owned(),
            created,
            counted: Counted { prompt, ..Counted::default() },
            text_bytes: vec![0; order.choices.len()],
            text: String::new(),
            order,
        }
    }

    /// The frames that tell of a token: its own, before the first of a chat also that of the role.
    pub(crate) fn token(&mut self, output: Output) -> Chunk {
        self.count(output);
        let mut bytes = BytesMut::with_capacity(320);
        let shown = self.show(output);
        if self.is_chat() {
            self.chat_token(output, shown, &mut bytes);
        } else {
            self.completion_token(output, shown, &mut bytes);
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
    pub(crate) fn end(&self) -> Chunk {
        let mut bytes = BytesMut::with_capacity(320);
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

    /// Puts the token's text into `self.text` and returns how many bytes of it are before a stop string.
    pub(super) fn show(&mut self, output: Output) -> usize {
        self.text.clear();
        tokens::push_text(output.index, &mut self.text);
        let at = output.sequence as usize;
        let shown = self.order.choices[at].shown_bytes.saturating_sub(self.text_bytes[at]).min(self.text.len());
        self.text_bytes[at] += self.text.len();
        shown
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
