//! Prompts: what of a request's text becomes token ids, through a chat template where there is a chat.

use serde_json::{Value, json};

use super::{error::ApiError, fields::Fields};
use crate::tokens;

/// `prompt` or `input`: a text, token ids, or a list of either.
pub(super) fn prompts(fields: &mut Fields, name: &str) -> Result<Vec<Vec<u32>>, ApiError> {
    let empty = || ApiError::bad_request(None, "Either prompt or prompt_embeds must be provided and non-empty.");
    let prompt = fields.take(name).ok_or_else(empty)?;
    let read = match &prompt {
        Value::String(text) if text.is_empty() => return Err(empty()),
        Value::Array(items) if items.is_empty() => return Err(empty()),
        Value::Array(items) if !items[0].is_number() => items.iter().map(one_prompt).collect(),
        one => one_prompt(one).map(|ids| vec![ids]),
    };
    Ok(match read {
        Some(prompts) => prompts,
        None => {
            let message = "Input should be a valid string, list of strings, list of token ids or list of lists of token ids";
            fields.wrong(name, "string_type", message, &prompt).unwrap_or_default()
        }
    })
}

fn one_prompt(prompt: &Value) -> Option<Vec<u32>> {
    match prompt {
        Value::String(text) => Some(text_prompt(text)),
        Value::Array(items) => items.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect(),
        _ => None,
    }
}

/// The ids of a text that the engine goes on with.
pub(super) fn text_prompt(text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    tokens::tokenize_unfinished(text, &mut ids);
    ids
}

/// How a chat's template ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// With the mark of the answer's role.
    Answer,
    /// After the last message.
    Nothing,
    /// Within the last message: the answer goes on with it.
    Open,
}

impl Ending {
    /// What the request asks for, or the engine does unasked with a last message of the assistant's.
    ///
    /// # Errors
    /// If it asks for two endings, as is vLLM's default unless it is told.
    pub(super) fn of(fields: &mut Fields, name: &str, assistant_prefill: bool) -> Result<Self, ApiError> {
        let adds = fields.boolean_or("add_generation_prompt", true);
        if fields.boolean("continue_final_message") {
            let message = "continue_final_message and add_generation_prompt are not compatible. Use continue_final_message when \
                           you want the model to continue the final message, and add_generation_prompt when you want to add a \
                           header that will prompt it to start a new assistant message instead.";
            return if adds { Err(ApiError::bad_request(None, message)) } else { Ok(Self::Open) };
        }
        let is_prefill = assistant_prefill && fields.last_role(name) == Some("assistant");
        Ok(if is_prefill {
            Self::Open
        } else if adds {
            Self::Answer
        } else {
            Self::Nothing
        })
    }
}

/// The messages under `name`, `tools` and what comes before them through a chat template: a mark for the role, the
/// content, a mark for its end; at last the mark of the answer's role, unless the ending is another. So a chat's next turn
/// begins with this turn's prompt and output, and a chat that is gone on with has the ids that it had.
pub(super) fn messages(fields: &mut Fields, name: &str, ending: Ending) -> Option<Vec<u32>> {
    let Some(messages) = fields.take(name) else {
        fields.missing(name);
        return None;
    };
    let messages = match messages {
        Value::Array(messages) => messages,
        Value::String(text) if name == "input" => vec![json!({ "role": "user", "content": text })],
        other => return fields.wrong(name, "list_type", "Input should be a valid list", &other),
    };
    let mut ids = Vec::new();
    if let Some(tools) = fields.list("tools").filter(|tools| !tools.is_empty()) {
        ids.push(tokens::mark("tools"));
        tokens::tokenize(&Value::Array(tools).to_string(), &mut ids);
    }
    for before in ["system", "instructions"].into_iter().filter_map(|name| fields.take(name)) {
        ids.push(tokens::mark("system"));
        tokenize_content(&before, false, &mut ids);
        ids.push(tokens::mark("end"));
    }
    for (at, message) in messages.iter().enumerate() {
        // Items of a response's input that are no messages have a type only.
        let role = message.get("role").or_else(|| message.get("type")).and_then(Value::as_str);
        let Some(role) = role else {
            return fields.wrong(&format!("{name}.{at}.role"), "missing", "Field required", message);
        };
        ids.push(tokens::mark(role));
        let is_open = ending == Ending::Open && at + 1 == messages.len();
        if message.get("content").is_some_and(|content| !tokenize_content(content, is_open, &mut ids)) {
            let content = &message["content"];
            return fields.wrong(&format!("{name}.{at}.content"), "string_type", "Input should be a valid string", content);
        }
        for said in ["tool_calls", "arguments", "output"].into_iter().filter_map(|name| message.get(name)) {
            if !said.is_null() {
                tokens::tokenize(&said.to_string(), &mut ids);
            }
        }
        if !is_open {
            ids.push(tokens::mark("end"));
        }
    }
    if ending == Ending::Answer {
        ids.push(tokens::mark("assistant"));
    }
    Some(ids)
}

/// A text, or parts; false if it is neither.
fn tokenize_content(content: &Value, is_open: bool, ids: &mut Vec<u32>) -> bool {
    let tokenize_text = |text: &str, is_open: bool, ids: &mut Vec<u32>| {
        if is_open { tokens::tokenize_unfinished(text, ids) } else { tokens::tokenize(text, ids) }
    };
    match content {
        Value::Null => {}
        Value::String(text) => tokenize_text(text, is_open, ids),
        Value::Array(parts) => {
            for (at, part) in parts.iter().enumerate() {
                match part.get("text").and_then(Value::as_str) {
                    Some(text) => tokenize_text(text, is_open && at + 1 == parts.len(), ids),
                    // One token for an image or the like.
                    None => ids.push(tokens::mark(&part.to_string())),
                }
            }
        }
        _ => return false,
    }
    true
}
