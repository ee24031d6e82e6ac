//! A chat as templates are given it: vLLM's conversation, from OpenAI's messages.
//!
//! Contract: content is one text, its parts joined by line breaks, or, for a template that goes through them, a list of parts;
//! arguments of calls are objects; a template that does not know developers is told what they say by the system. At the first
//! part that is not text the prompt ends: what an engine puts there is not known here.

use minijinja::{Value, value::ValueKind};

use crate::{
    error::PromptError,
    template::{ChatTemplate, Templates},
};

/// What begins a line of Claude Code's that differs in every request; vLLM takes it out, so that prefixes can be shared.
const BILLING: &str = "x-anthropic-billing-header";

/// Marks a place in a rendered text. Private-use characters, so that no chat has it by chance.
const END_MARK: &str = "\u{f8fe}dynamo-host-end\u{f8ff}";

/// Transformers' own mark of where the final message, to be continued, ends. Some templates trim what they render.
const CONTINUE_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// A chat, and how it is to be rendered.
pub(crate) struct Chat {
    pub(super) messages: Vec<Value>,
    pub(super) tools: Option<Value>,
    /// More that the template is given.
    pub(super) template: Vec<(String, Value)>,
    pub(super) add_generation_prompt: bool,
    pub(super) continue_final_message: bool,
    /// Whether the tokenizer adds its special tokens to what the template has.
    pub(crate) special: bool,
    pub(super) is_exact: bool,
}

/// A rendered chat.
pub(crate) struct Rendered {
    pub(crate) text: String,
    pub(crate) is_exact: bool,
}

impl Chat {
    /// As most are rendered.
    pub(super) fn plain(messages: Vec<Value>) -> Self {
        Self {
            messages,
            tools: None,
            template: Vec::new(),
            add_generation_prompt: true,
            continue_final_message: false,
            special: false,
            is_exact: true,
        }
    }

    /// Renders it by a model's template, with its special tokens by their names.
    pub(crate) fn render<'a>(
        self,
        templates: &Templates,
        special: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<Rendered, PromptError> {
        let tools = self.tools.map(|tools| tools.try_iter().into_iter().flatten().map(|tool| dumped(&tool)).collect::<Value>());
        let template = templates.choose(tools.is_some()).ok_or(PromptError::NoTemplate)?;
        let mut conversation = Conversation { is_exact: self.is_exact, ..Conversation::default() };
        for message in &self.messages {
            conversation.add(message, template)?;
            if conversation.is_cut {
                break;
            }
        }
        let Conversation { mut messages, is_exact, is_cut, has_developer } = conversation;
        if has_developer && !template.knows_developer {
            messages = with_one_system(messages);
        }
        let continues = self.continue_final_message && !is_cut;
        if continues {
            if self.add_generation_prompt {
                let refusal = "continue_final_message and add_generation_prompt exclude each other";
                return Err(PromptError::Unreadable(refusal.to_owned()));
            }
            mark_last(&mut messages)?;
        }
        let mut context: Vec<(String, Value)> =
            special.map(|(name, token)| (name.to_owned(), Value::from(token))).chain(self.template).collect();
        let fixed = [
            ("messages", Value::from(messages)),
            ("tools", tools.unwrap_or_else(|| ().into())),
            ("add_generation_prompt", self.add_generation_prompt.into()),
        ];
        context.extend(fixed.map(|(name, value)| (name.to_owned(), value)));
        if !context.iter().any(|(name, _)| name == "documents") {
            context.push(("documents".to_owned(), ().into()));
        }
        let mut text = templates.render(template, Value::from_pairs(context))?;
        if is_cut {
            let end = text.find(END_MARK).ok_or_else(|| PromptError::Template("it leaves out parts".to_owned()))?;
            text.truncate(end);
        }
        if continues {
            let mark = CONTINUE_MARK.trim_end();
            let end = text.rfind(mark).ok_or_else(|| PromptError::Template("it leaves out the final message".to_owned()))?;
            let is_spaced = text[end..].starts_with(CONTINUE_MARK);
            text.truncate(if is_spaced { end } else { text[..end].trim_end().len() });
        }
        Ok(Rendered { text, is_exact: is_exact && !is_cut })
    }
}

/// Messages as the template is given them.
#[derive(Default)]
struct Conversation {
    messages: Vec<Value>,
    is_exact: bool,
    /// It ends where something comes that is not text.
    is_cut: bool,
    has_developer: bool,
}

impl Conversation {
    fn add(&mut self, message: &Value, template: &ChatTemplate) -> Result<(), PromptError> {
        let member = |name: &str| message.get_attr(name).ok().filter(|value| !value.is_none() && !value.is_undefined());
        let role = member("role").ok_or_else(|| PromptError::Unreadable("a message has no role".to_owned()))?;
        let is = |name: &str| role.as_str() == Some(name);
        let texts = self.texts(member("content"), is("system"), template.takes_parts);
        let content = if template.takes_parts && !is("tool") {
            texts.iter().map(|text| Value::from_pairs([("type", "text"), ("text", text.as_str())])).collect()
        } else {
            Value::from(texts.join("\n"))
        };
        let mut said = vec![("role", role.clone()), ("content", content)];
        if is("assistant") {
            if let Some(calls) = member("tool_calls").filter(|calls| calls.len() != Some(0)) {
                said.push(("tool_calls", calls.try_iter().into_iter().flatten().map(|call| with_arguments(&call)).collect()));
            }
            if let Some(reasoning) = member("reasoning").or_else(|| member("reasoning_content")) {
                said.extend([("reasoning", reasoning.clone()), ("reasoning_content", reasoning)]);
            }
        }
        said.extend(member("tool_call_id").filter(|_| is("tool")).map(|id| ("tool_call_id", id)));
        for name in ["name", "task"] {
            said.extend(member(name).filter(|value| value.as_str().is_some()).map(|value| (name, value)));
        }
        if is("developer") {
            self.has_developer = true;
            said.push(("tools", member("tools").unwrap_or_else(|| ().into())));
        }
        self.messages.push(Value::from_pairs(said));
        Ok(())
    }

    /// The texts of a content, up to the first part that is none.
    fn texts(&mut self, content: Option<Value>, is_system: bool, takes_parts: bool) -> Vec<String> {
        let parts = match content {
            None => Vec::new(),
            Some(content) if content.kind() == ValueKind::Seq => content.try_iter().into_iter().flatten().collect(),
            Some(text) => vec![text],
        };
        let mut texts = Vec::with_capacity(parts.len());
        for part in parts {
            let kind = part.get_attr("type").unwrap_or_default();
            let text = match kind.as_str() {
                None => part.as_str().map(str::to_owned),
                Some("text" | "input_text" | "output_text") => text_at(&part, "text"),
                Some(kind @ ("refusal" | "thinking")) => text_at(&part, kind),
                Some(_) => None,
            };
            let Some(text) = text else {
                // Where a template wants one text, engines put what is none before it.
                if !takes_parts {
                    texts.clear();
                }
                texts.push(END_MARK.to_owned());
                self.is_cut = true;
                break;
            };
            match text.strip_prefix(BILLING).filter(|_| is_system) {
                None => texts.push(text),
                Some(line) => {
                    texts.extend(line.split_once('\n').map(|(_, rest)| rest.to_owned()).filter(|rest| !rest.is_empty()));
                }
            }
        }
        texts
    }
}

/// Whether vLLM leaves a text of the system out.
pub(super) fn is_billing(text: &str) -> bool {
    text.starts_with(BILLING)
}

fn text_at(part: &Value, name: &str) -> Option<String> {
    part.get_attr(name).ok()?.as_str().map(str::to_owned)
}

/// A call with its arguments as an object: an empty one where they are none.
fn with_arguments(call: &Value) -> Value {
    let Ok(function) =
        call.get_attr("function").map_err(drop).and_then(|it| if it.kind() == ValueKind::Map { Ok(it) } else { Err(()) })
    else {
        return call.clone();
    };
    let written = function.get_attr("arguments").unwrap_or_default();
    let parsed = written.as_str().and_then(|json| serde_json::from_str::<Value>(json).ok());
    let object = parsed.or(Some(written)).filter(|value| value.kind() == ValueKind::Map);
    let arguments = object.unwrap_or_else(|| Value::from_pairs(std::iter::empty::<(&str, Value)>()));
    with(call, "function", with(&function, "arguments", arguments))
}

/// A map with another value for one of its names.
fn with(map: &Value, name: &str, value: Value) -> Value {
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    let mut is_there = false;
    for key in map.try_iter().into_iter().flatten() {
        let is_it = key.as_str() == Some(name);
        is_there |= is_it;
        let kept = if is_it { value.clone() } else { map.get_item(&key).unwrap_or_default() };
        pairs.push((key, kept));
    }
    if !is_there {
        pairs.push((name.into(), value));
    }
    Value::from_pairs(pairs)
}

/// A tool as vLLM's own types write it: these fields, in this order.
fn dumped(tool: &Value) -> Value {
    let member = |of: &Value, name: &str| of.get_attr(name).ok().filter(|value| !value.is_undefined() && !value.is_none());
    let function = member(tool, "function").unwrap_or_default();
    let or_none = |name: &str| member(&function, name).unwrap_or_else(|| ().into());
    let mut fields =
        vec![("name", or_none("name")), ("description", or_none("description")), ("parameters", or_none("parameters"))];
    fields.extend(member(&function, "strict").map(|value| ("strict", value)));
    let deferred = member(tool, "defer_loading");
    fields.extend(member(&function, "defer_loading").or_else(|| deferred.clone()).map(|value| ("defer_loading", value)));
    let mut dumped = vec![("type", Value::from("function")), ("function", Value::from_pairs(fields))];
    dumped.extend(deferred.map(|value| ("defer_loading", value)));
    Value::from_pairs(dumped)
}

/// For a template that knows no developers: they are the system, and if that then speaks anywhere but at first, it says all
/// of it there.
fn with_one_system(messages: Vec<Value>) -> Vec<Value> {
    let role = |message: &Value| message.get_attr("role").unwrap_or_default().to_string();
    let as_system = |message: Value| {
        if role(&message) != "developer" {
            return message;
        }
        let kept = message.try_iter().into_iter().flatten().filter(|name| !matches!(name.as_str(), Some("role" | "tools")));
        let kept = kept.map(|name| (name.clone(), message.get_item(&name).unwrap_or_default()));
        Value::from_pairs(std::iter::once((Value::from("role"), Value::from("system"))).chain(kept))
    };
    let messages: Vec<Value> = messages.into_iter().map(as_system).collect();
    if messages.iter().skip(1).all(|message| role(message) != "system") {
        return messages;
    }
    let text = |content: Value| match content.as_str() {
        Some(text) => text.to_owned(),
        None => content.try_iter().into_iter().flatten().filter_map(|part| text_at(&part, "text")).collect::<Vec<_>>().join("\n"),
    };
    let (systems, others): (Vec<_>, Vec<_>) = messages.into_iter().partition(|message| role(message) == "system");
    let said = systems.into_iter().map(|system| text(system.get_attr("content").unwrap_or_default()));
    let said: Vec<String> = said.filter(|text| !text.is_empty()).collect();
    let first = Value::from_pairs([("role", "system".to_owned()), ("content", said.join("\n\n"))]);
    std::iter::once(first).chain(others).collect()
}

/// Marks the end of the final message's text.
fn mark_last(messages: &mut [Value]) -> Result<(), PromptError> {
    let nothing = || PromptError::Unreadable("the final message has no text to continue".to_owned());
    let last = messages.last_mut().ok_or_else(nothing)?;
    let content = last.get_attr("content").unwrap_or_default();
    let marked = match content.as_str() {
        Some(text) => Value::from(format!("{text}{CONTINUE_MARK}")),
        None => {
            let mut parts: Vec<Value> = content.try_iter().into_iter().flatten().collect();
            let part = parts.last_mut().ok_or_else(nothing)?;
            let text = text_at(part, "text").ok_or_else(nothing)?;
            *part = with(part, "text", Value::from(format!("{text}{CONTINUE_MARK}")));
            Value::from(parts)
        }
    };
    *last = with(last, "content", marked);
    Ok(())
}
