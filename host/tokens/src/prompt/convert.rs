//! Chats of all APIs as chats of one: OpenAI's messages, which templates are written for.
//!
//! What vLLM converts in a way that depends on more than the body (tools of Anthropic's API, items of a response that are no
//! messages) is converted plainly, so that prompts that begin alike still do, and said to be inexact.

use dynamo_host_core::Endpoint;
use minijinja::{Value, value::ValueKind};

use super::{Chat, Fields};
use crate::error::PromptError;

/// The chat that a body asks about.
pub(super) fn chat(endpoint: Endpoint, fields: &Fields<'_>) -> Result<Chat, PromptError> {
    match endpoint {
        Endpoint::Responses => of_response(fields),
        Endpoint::Messages | Endpoint::CountTokens => of_message(fields),
        _ => of_chat(fields),
    }
}

fn of_chat(fields: &Fields<'_>) -> Result<Chat, PromptError> {
    let messages = list(fields, "messages")?;
    let arguments = |name: &str| fields.read(name).map(|value| value.map(|value| (name.to_owned(), value)));
    let mut template: Vec<(String, Value)> = Vec::new();
    if let Some(given) = fields.read("chat_template_kwargs")? {
        for name in given.try_iter().into_iter().flatten() {
            template.push((name.to_string(), given.get_item(&name).unwrap_or_default()));
        }
    }
    let is_set = |name: &str| template.iter().any(|(set, _)| set == name);
    // What asks Transformers for something other than a text.
    let is_odd = ["tokenize", "truncation", "max_length", "padding", "return_dict", "chat_template"].into_iter().any(is_set);
    let effort = arguments("reasoning_effort")?;
    let thinks = effort.as_ref().filter(|_| !is_set("enable_thinking")).map(|(_, effort)| effort.as_str() != Some("none"));
    template.extend(thinks.map(|thinks| ("enable_thinking".to_owned(), thinks.into())));
    template.extend(effort);
    template.extend(arguments("documents")?);
    Ok(Chat {
        messages,
        tools: fields.read("tools")?,
        template,
        add_generation_prompt: fields.flag("add_generation_prompt").unwrap_or(true),
        continue_final_message: fields.flag("continue_final_message").unwrap_or_default(),
        special: fields.flag("add_special_tokens").unwrap_or_default(),
        is_exact: !is_odd && !fields.any(&["chat_template", "truncate_prompt_tokens", "mm_processor_kwargs"]),
    })
}

fn of_response(fields: &Fields<'_>) -> Result<Chat, PromptError> {
    let mut is_exact = !fields.any(&["tools", "reasoning", "prompt", "truncation"]);
    let mut messages = Vec::new();
    if let Some(instructions) = fields.read("instructions")?.filter(|said| said.as_str() != Some("")) {
        messages.push(message("system", instructions));
    }
    match fields.read("input")? {
        Some(input) if input.as_str().is_some() => messages.push(message("user", input)),
        Some(_) => {
            let items = list(fields, "input")?;
            for item in items {
                let kind = item.get_attr("type").unwrap_or_default();
                let is_message = kind.is_undefined() || kind.as_str() == Some("message");
                is_exact &= is_message && item.get_attr("content").is_ok_and(|content| content.as_str().is_some());
                messages.push(if is_message { item } else { message("user", Value::from(item.to_string())) });
            }
        }
        None => return Err(PromptError::Unreadable("input is missing".to_owned())),
    }
    Ok(Chat { tools: fields.read("tools")?.map(response_tools), is_exact, ..Chat::plain(messages) })
}

/// A response's tools have their function's fields in themselves.
fn response_tools(tools: Value) -> Value {
    tools
        .try_iter()
        .into_iter()
        .flatten()
        .map(|tool| Value::from_pairs([("type", "function".into()), ("function", tool)]))
        .collect()
}

fn of_message(fields: &Fields<'_>) -> Result<Chat, PromptError> {
    let mut is_exact = !fields.any(&["tools", "thinking", "output_config", "mcp_servers", "container"]);
    let mut messages = Vec::new();
    let system = match fields.read("system")? {
        Some(system) if system.as_str().is_some() => system.to_string(),
        Some(blocks) => {
            let texts = blocks.try_iter().into_iter().flatten().filter_map(|block| text_of(&block));
            texts.filter(|text| !super::chat::is_billing(text)).collect()
        }
        None => String::new(),
    };
    if !system.is_empty() {
        messages.push(message("system", system.into()));
    }
    for said in list(fields, "messages")? {
        let role = said.get_attr("role").unwrap_or_default();
        let content = said.get_attr("content").unwrap_or_default();
        is_exact &= role.as_str() != Some("system");
        if content.kind() != ValueKind::Seq {
            messages.push(said);
            continue;
        }
        let blocks: Vec<Value> = content.try_iter().into_iter().flatten().collect();
        let texts: Vec<String> = blocks.iter().filter_map(text_of).collect();
        match (texts.as_slice(), blocks.len()) {
            ([text], 1) => messages.push(message(role.as_str().unwrap_or_default(), text.as_str().into())),
            (texts, blocks) if texts.len() == blocks => messages.push(said),
            _ => {
                is_exact = false;
                messages.extend(blocks.into_iter().map(|block| of_block(role.as_str().unwrap_or_default(), block)));
            }
        }
    }
    let tools =
        fields.read("tools")?.map(|tools| tools.try_iter().into_iter().flatten().map(|tool| anthropic_tool(&tool)).collect());
    Ok(Chat { tools, is_exact, ..Chat::plain(messages) })
}

/// A block among others as a message of its own.
fn of_block(role: &str, block: Value) -> Value {
    match block.get_attr("type").unwrap_or_default().as_str() {
        Some("tool_use") => {
            let member = |name: &str| block.get_attr(name).unwrap_or_default();
            let function = Value::from_pairs([("name", member("name")), ("arguments", member("input"))]);
            let call = Value::from_pairs([("id", member("id")), ("type", "function".into()), ("function", function)]);
            let said = [("role", Value::from(role)), ("content", Value::from("")), ("tool_calls", Value::from_iter([call]))];
            Value::from_pairs(said)
        }
        Some("tool_result") => message("tool", block.get_attr("content").unwrap_or_default()),
        _ => message(role, Value::from_iter([block])),
    }
}

fn anthropic_tool(tool: &Value) -> Value {
    let member = |name: &str| tool.get_attr(name).unwrap_or_default();
    let fields = [("name", member("name")), ("description", member("description")), ("parameters", member("input_schema"))];
    Value::from_pairs([("type", "function".into()), ("function", Value::from_pairs(fields))])
}

fn text_of(block: &Value) -> Option<String> {
    let is_text = block.get_attr("type").is_ok_and(|kind| kind.as_str() == Some("text"));
    block.get_attr("text").ok().filter(|_| is_text)?.as_str().map(str::to_owned)
}

fn message(role: &str, content: Value) -> Value {
    Value::from_pairs([("role", Value::from(role)), ("content", content)])
}

/// A list's items, of which there is at least one.
fn list(fields: &Fields<'_>, name: &'static str) -> Result<Vec<Value>, PromptError> {
    let items = fields.read(name)?.filter(|value| value.kind() == ValueKind::Seq);
    let items: Vec<Value> = items.iter().flat_map(|items| items.try_iter().into_iter().flatten()).collect();
    if items.is_empty() { Err(PromptError::Unreadable(format!("{name} is no list of messages"))) } else { Ok(items) }
}
