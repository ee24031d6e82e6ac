//! Splicing: a continuation's frames made into frames of the stream that its client reads.
//!
//! Invariants: every frame has the id, model and time of the first one; a role comes once for each choice; what the
//! continuation says of its own prompt and usage does not come through.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use bytes::Bytes;
use dynamo_engine_api::{Endpoint, sse::DONE_FRAME};
use serde_json::{Map, Value, json};

use super::{
    record::{Choice, Said, Stage},
    seam::{Passed, Seam},
};

/// What all choices of a stream have in common.
#[derive(Debug)]
pub(super) struct Splice {
    endpoint: Endpoint,
    head: BTreeMap<&'static str, Value>,
    /// Whether the client asked for token ids.
    returns_ids: bool,
    has_continuous_usage: bool,
    pub(super) tally: Tally,
}

/// Tokens as the client is told of them.
#[derive(Debug)]
pub(super) struct Tally {
    /// By prompt; 0: not known.
    prompts: Vec<AtomicU32>,
    /// By choice.
    outputs: Vec<AtomicU32>,
    /// What an engine said of all prompts, before the first seam.
    prompt_tokens: Option<u32>,
    /// What the host believes them to be.
    estimate: u32,
}

/// What came of a chunk.
#[derive(Debug, Default)]
pub(super) struct Spliced {
    pub(super) frames: Vec<u8>,
    /// Whether a stop string across the seam ended the choice, so that the engine need not go on.
    pub(super) is_stopped: bool,
}

impl Splice {
    pub(super) fn new(endpoint: Endpoint, said: &Said, choices: u32, prompts: usize, returns_ids: bool, estimate: u32) -> Self {
        let zeros = |count: usize| (0..count).map(|_| AtomicU32::new(0)).collect::<Vec<_>>();
        let tally = Tally {
            prompts: zeros(prompts),
            outputs: zeros(choices as usize),
            prompt_tokens: said.usage.map(|usage| usage.prompt_tokens).filter(|&tokens| tokens > 0),
            estimate,
        };
        let has_continuous_usage = said.has_continuous_usage;
        Self { endpoint, head: said.head.clone(), returns_ids, has_continuous_usage, tally }
    }

    /// Makes frames of a continuation's chunk, and takes down in `choice` what the client has then.
    pub(super) fn frames(&self, chunk: &[u8], index: u32, choice: &mut Choice, seam: &mut Seam, is_by_ids: bool) -> Spliced {
        let mut spliced = Spliced::default();
        for line in chunk.split(|&byte| byte == b'\n') {
            let Some(data) = line.strip_prefix(b"data:") else { continue };
            let Ok(frame) = serde_json::from_slice::<Map<String, Value>>(data.trim_ascii()) else { continue };
            if let Some(frame) = self.frame(frame, index, choice, seam, is_by_ids, &mut spliced.is_stopped) {
                push_frame(&mut spliced.frames, frame);
            }
            if spliced.is_stopped {
                break;
            }
        }
        spliced
    }

    fn frame(
        &self,
        mut frame: Map<String, Value>,
        index: u32,
        choice: &mut Choice,
        seam: &mut Seam,
        is_by_ids: bool,
        is_stopped: &mut bool,
    ) -> Option<Value> {
        let of_frame = frame.remove("prompt_token_ids");
        let Some(Value::Object(mut said)) = frame.get_mut("choices")?.as_array_mut()?.pop() else { return None };
        let of_choice = said.remove("prompt_token_ids");
        if !is_by_ids && choice.prompt_ids.is_none() {
            let given = [of_frame, of_choice].into_iter().flatten().find(|ids| !ids.is_null());
            choice.prompt_ids = given.and_then(|ids| serde_json::from_value(ids).ok());
        }
        let ids: Vec<u32> = said.remove("token_ids").and_then(|ids| serde_json::from_value(ids).ok()).unwrap_or_default();
        let mut delta = match said.remove("delta") {
            Some(Value::Object(delta)) => delta,
            _ => Map::new(),
        };
        let text = match said.remove("text").or_else(|| delta.remove("content")) {
            Some(Value::String(text)) => text,
            // Content that is no text passes as it is.
            Some(other) => {
                delta.insert("content".to_owned(), other);
                String::new()
            }
            None => String::new(),
        };
        delta.remove("role");
        delta.retain(|_, value| !value.is_null() && value != "" && value.as_array().is_none_or(|array| !array.is_empty()));
        let other = delta.keys().next().map(|name| Stage::of(name));
        let is_last = said.get("finish_reason").is_some_and(|reason| !reason.is_null() && reason != "");
        let had_text = !text.is_empty();
        let text = match seam.pass(&text, is_last) {
            Passed::Text(text) => text,
            Passed::Stop { text, stop } => {
                said.insert("finish_reason".to_owned(), "stop".into());
                said.insert("stop_reason".to_owned(), stop.into());
                *is_stopped = true;
                text
            }
        };
        choice.take(&text, &ids, other);
        choice.is_finished |= is_last || *is_stopped;
        self.tally.outputs[index as usize].store(choice.tokens, Relaxed);
        // What the client had before has told its log probabilities then; of what else has no text yet they are told now.
        choice.is_remade &= text.is_empty();
        let is_repeated = choice.is_remade || had_text && text.is_empty() && !seam.is_holding();
        let is_telling = other.is_some() || choice.is_finished || has_logprobs(&said) && !is_repeated;
        if text.is_empty() && !is_telling && (ids.is_empty() || !self.returns_ids) {
            return None;
        }
        said.insert("index".to_owned(), index.into());
        if self.returns_ids {
            said.insert("token_ids".to_owned(), ids.into());
        }
        if self.endpoint == Endpoint::ChatCompletions {
            if !std::mem::replace(&mut choice.has_role, true) {
                delta.insert("role".to_owned(), "assistant".into());
            }
            if !text.is_empty() || (other.is_none() && !choice.is_finished) {
                delta.insert("content".to_owned(), text.into());
            }
            said.insert("delta".to_owned(), delta.into());
        } else {
            said.insert("text".to_owned(), text.into());
        }
        frame.remove("prompt_text");
        frame.remove("usage");
        if self.has_continuous_usage {
            frame.insert("usage".to_owned(), self.tally.usage());
        }
        frame.insert("choices".to_owned(), json!([said]));
        frame.extend(self.head.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        Some(Value::Object(frame))
    }

    /// The end of a choice that has all its tokens.
    pub(super) fn full(&self, index: u32, choice: &mut Choice) -> Vec<u8> {
        choice.is_finished = true;
        let mut said = json!({ "index": index, "finish_reason": "length", "logprobs": null });
        if self.endpoint == Endpoint::ChatCompletions {
            said["delta"] = json!({});
        } else {
            said["text"] = "".into();
        }
        self.own(said)
    }

    /// The frames after all choices.
    pub(super) fn end(&self, wants_usage: bool) -> Bytes {
        let mut frames = Vec::new();
        if wants_usage {
            let mut frame = self.framed(json!([]));
            frame["usage"] = self.tally.usage();
            push_frame(&mut frames, frame);
        }
        frames.extend_from_slice(DONE_FRAME);
        frames.into()
    }

    fn own(&self, choice: Value) -> Vec<u8> {
        let mut frame = self.framed(json!([choice]));
        if self.has_continuous_usage {
            frame["usage"] = self.tally.usage();
        }
        let mut frames = Vec::new();
        push_frame(&mut frames, frame);
        frames
    }

    fn framed(&self, choices: Value) -> Value {
        let mut frame: Map<String, Value> = self.head.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        frame.insert("choices".to_owned(), choices);
        Value::Object(frame)
    }
}

impl Tally {
    /// How long a prompt is. What was said first holds.
    pub(super) fn prompt(&self, prompt: usize, tokens: u32) {
        if let Some(known) = self.prompts.get(prompt) {
            let _ = known.compare_exchange(0, tokens, Relaxed, Relaxed);
        }
    }

    /// Whether it is known how long a prompt is.
    pub(super) fn knows(&self, prompt: usize) -> bool {
        self.prompt_tokens.is_some() || self.prompts.get(prompt).is_some_and(|tokens| tokens.load(Relaxed) > 0)
    }

    /// Output tokens of a choice, before more come.
    pub(super) fn output(&self, choice: u32, tokens: u32) {
        self.outputs[choice as usize].store(tokens, Relaxed);
    }

    pub(super) fn prompt_tokens(&self) -> u32 {
        let known: Vec<u32> = self.prompts.iter().map(|prompt| prompt.load(Relaxed)).collect();
        let sum =
            known.iter().all(|&tokens| tokens > 0).then(|| known.iter().fold(0, |sum: u32, &tokens| sum.saturating_add(tokens)));
        self.prompt_tokens.or(sum).unwrap_or(self.estimate)
    }

    pub(super) fn output_tokens(&self) -> u32 {
        self.outputs.iter().fold(0, |sum: u32, tokens| sum.saturating_add(tokens.load(Relaxed)))
    }

    fn usage(&self) -> Value {
        let (prompt, output) = (self.prompt_tokens(), self.output_tokens());
        json!({ "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": u64::from(prompt) + u64::from(output) })
    }
}

/// Whether a chat's choice tells log probabilities.
fn has_logprobs(said: &Map<String, Value>) -> bool {
    said.get("logprobs").and_then(|told| told["content"].as_array()).is_some_and(|tokens| !tokens.is_empty())
}

fn push_frame(frames: &mut Vec<u8>, frame: Value) {
    frames.extend_from_slice(b"data: ");
    frames.extend_from_slice(frame.to_string().as_bytes());
    frames.extend_from_slice(b"\n\n");
}
