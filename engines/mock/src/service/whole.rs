//! Whole: an order's tokens collected into one body.

use std::sync::Arc;

use bytes::Bytes;
use dynamo_engine_api::Endpoint;
use serde_json::{Value, json, value::RawValue};

use super::{
    anthropic,
    order::Choice,
    reply::{FINGERPRINT, Rendering},
    responses,
    shapes::{Chat, ChatChoice, Completion, Message, PromptTokensDetails, TextChoice, Usage},
};
use crate::{driver::Output, model::FinishReason};

/// Collects one order's whole reply.
#[derive(Debug)]
pub(crate) struct Whole {
    rendering: Rendering,
    collected: Vec<Collected>,
    /// What whoever goes on is to be told.
    kept: Option<Box<RawValue>>,
}

#[derive(Clone, Debug, Default)]
struct Collected {
    text: String,
    token_ids: Vec<u32>,
    finish: Option<FinishReason>,
}

impl Whole {
    pub(crate) fn new(rendering: Rendering) -> Self {
        Self { collected: vec![Collected::default(); rendering.order.choices.len()], rendering, kept: None }
    }

    /// Takes a token.
    pub(crate) fn token(&mut self, output: Output) {
        self.rendering.count(output);
        let shown = self.rendering.show(output);
        let collected = &mut self.collected[output.sequence as usize];
        collected.text.push_str(&self.rendering.text[..shown]);
        collected.token_ids.push(output.token);
        collected.finish = output.finish;
    }

    /// Its id, the prompt of its first choice with what keeps it apart, and how many of those tokens were cached.
    pub(crate) fn prompt(&self) -> (&str, Arc<[u32]>, u64, u32) {
        let Rendering { order, id, counted, .. } = &self.rendering;
        (id, Arc::clone(&order.choices[0].prompt), order.salt, counted.cached)
    }

    /// Its KV is kept.
    pub(crate) fn kept(&mut self, params: Box<RawValue>) {
        self.kept = Some(params);
    }

    /// The body, after the last token.
    pub(crate) fn body(&self) -> Bytes {
        let first = &self.collected[0];
        let body = match self.rendering.order.endpoint {
            Endpoint::ChatCompletions => serde_json::to_vec(&self.chat()),
            Endpoint::Messages => serde_json::to_vec(&anthropic::message(&self.rendering, &first.text, first.finish)),
            Endpoint::Responses => serde_json::to_vec(&responses::response(&self.rendering, Some(&first.text), first.finish)),
            Endpoint::Embeddings => serde_json::to_vec(&self.embeddings()),
            Endpoint::Completions | Endpoint::CountTokens => serde_json::to_vec(&self.completion()),
        };
        body.expect("numbers and strings serialize").into()
    }

    fn chat(&self) -> Chat<'_> {
        let Rendering { order, id, model, created, .. } = &self.rendering;
        let choice = |(index, collected, choice): (u32, _, _)| chat_choice(index, collected, choice, order.return_token_ids);
        Chat {
            id,
            object: "chat.completion",
            created: *created,
            model,
            choices: self.choices().map(choice).collect(),
            service_tier: (),
            system_fingerprint: FINGERPRINT,
            usage: self.usage(Some(0)),
            prompt_logprobs: (),
            prompt_token_ids: order.choices.first().filter(|_| order.return_token_ids).map(|choice| &*choice.prompt),
            prompt_text: (),
            kv_transfer_params: self.kept.as_deref(),
            ec_transfer_params: (),
            metrics: (),
        }
    }

    fn embeddings(&self) -> Value {
        let Rendering { order, id, model, created, counted, .. } = &self.rendering;
        let items = order.choices.iter().enumerate().map(|(at, choice)| order.embedding.item(at, &choice.prompt));
        let usage = json!({
            "prompt_tokens": counted.prompt, "total_tokens": counted.prompt, "completion_tokens": 0,
            "prompt_tokens_details": null,
        });
        json!({
            "id": id, "object": "list", "created": created, "model": model, "data": items.collect::<Vec<_>>(), "usage": usage,
        })
    }

    fn completion(&self) -> Completion<'_> {
        let Rendering { order, id, model, created, .. } = &self.rendering;
        let choice = |(index, collected, choice): (u32, _, _)| text_choice(index, collected, choice, order.return_token_ids);
        Completion {
            id,
            object: "text_completion",
            created: *created,
            model,
            choices: self.choices().map(choice).collect(),
            service_tier: (),
            system_fingerprint: FINGERPRINT,
            usage: self.usage(None),
            kv_transfer_params: self.kept.as_deref(),
            ec_transfer_params: (),
            metrics: (),
        }
    }

    fn choices(&self) -> impl Iterator<Item = (u32, &Collected, &Choice)> {
        (0..)
            .zip(self.collected.iter().zip(&self.rendering.order.choices))
            .map(|(index, (collected, choice))| (index, collected, choice))
    }

    fn usage(&self, created_cache_tokens: Option<u32>) -> Usage {
        let details = PromptTokensDetails {
            cached_tokens: self.rendering.counted.cached,
            created_cache_tokens: Some(created_cache_tokens),
            multimodal_tokens: Some(None),
        };
        Usage { prompt_tokens_details: Some(details), ..self.rendering.usage() }
    }
}

fn chat_choice<'a>(index: u32, collected: &'a Collected, choice: &'a Choice, return_token_ids: bool) -> ChatChoice<'a> {
    let message = Message {
        role: "assistant",
        content: &collected.text,
        refusal: (),
        annotations: (),
        audio: (),
        function_call: (),
        reasoning: (),
    };
    ChatChoice {
        index,
        message,
        logprobs: (),
        finish_reason: collected.finish.map(FinishReason::as_str),
        stop_reason: choice.stop_reason.as_deref(),
        token_ids: return_token_ids.then_some(&*collected.token_ids),
        routed_experts: (),
    }
}

fn text_choice<'a>(index: u32, collected: &'a Collected, choice: &'a Choice, return_token_ids: bool) -> TextChoice<'a> {
    TextChoice {
        index,
        text: &collected.text,
        logprobs: (),
        finish_reason: collected.finish.map(FinishReason::as_str),
        stop_reason: choice.stop_reason.as_deref(),
        token_ids: return_token_ids.then_some(&*collected.token_ids),
        prompt_logprobs: (),
        prompt_token_ids: return_token_ids.then_some(&*choice.prompt),
        routed_experts: (),
    }
}
