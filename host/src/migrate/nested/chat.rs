//! A request of such an API, said as the chat that engines make of it themselves.
//!
//! As vLLM and llama.cpp do it (both make chats of them): what they read alike is said so here; what they do not, or what a
//! chat has no word for, is refused. Fields that are not known pass as they are, like everywhere.

use dynamo_engine_api::Endpoint;
use serde_json::{Map, Value, json};

use super::text_of;
use crate::migrate::ask::Unsound;

/// Fields of messages that a chat does not have.
const ONLY_MESSAGES: &[&str] = &["system", "stop_sequences", "thinking", "output_config", "metadata", "service_tier"];
/// Fields of responses that a chat does not have, or has in another sense.
const ONLY_RESPONSES: &[&str] = &[
    "input",
    "instructions",
    "max_output_tokens",
    "reasoning",
    "text",
    "include",
    "store",
    "background",
    "metadata",
    "max_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "truncation",
    "top_logprobs",
    "previous_response_id",
    "conversation",
    "user",
];
/// What Claude Code puts before its system prompt, another one for each request: engines leave it out.
const BILLING: &str = "x-anthropic-billing-header";

type Fields = Map<String, Value>;

/// The chat that a request is.
///
/// # Errors
/// What of it has no counterpart in a chat.
pub(in crate::migrate) fn as_chat(endpoint: Endpoint, fields: Fields) -> Result<Fields, Unsound> {
    match endpoint {
        Endpoint::Messages => of_message(fields),
        _ => of_response(fields),
    }
}

fn of_message(mut fields: Fields) -> Result<Fields, Unsound> {
    let mut messages = Vec::new();
    let system = fields.get("system").map(system_text).unwrap_or_default();
    if !system.is_empty() {
        messages.push(json!({ "role": "system", "content": system }));
    }
    for message in fields.remove("messages").as_ref().and_then(Value::as_array).into_iter().flatten() {
        push_message(message, &mut messages)?;
    }
    fields.insert("messages".to_owned(), messages.into());
    if let Some(Value::Array(tools)) = fields.get("tools") {
        let tools: Option<Vec<Value>> = tools.iter().map(tool_of_message).collect();
        let tools = tools.ok_or(Unsound("it offers tools that a chat does not have"))?;
        fields.insert("tools".to_owned(), tools.into());
    }
    if let Some(choice) = fields.remove("tool_choice").filter(|choice| !choice.is_null()) {
        let said = match text_of(&choice["type"]) {
            "any" => "required".into(),
            "tool" => json!({ "type": "function", "function": { "name": choice["name"] } }),
            other => other.into(),
        };
        fields.insert("tool_choice".to_owned(), said);
        if choice["disable_parallel_tool_use"] == true {
            fields.insert("parallel_tool_calls".to_owned(), false.into());
        }
    }
    if let Some(stops) = fields.get("stop_sequences").filter(|stops| !stops.is_null()).cloned() {
        fields.insert("stop".to_owned(), stops);
    }
    if let Some(budget) = fields.get("thinking").and_then(|thinking| thinking.get("budget_tokens")).cloned() {
        // vLLM's name, and llama.cpp's.
        fields.insert("thinking_token_budget".to_owned(), budget.clone());
        fields.insert("thinking_budget_tokens".to_owned(), budget);
    }
    if fields.get("thinking").is_some_and(|thinking| thinking["type"] == "disabled") {
        fields.insert("reasoning_effort".to_owned(), "none".into());
    }
    let config = fields.get("output_config").cloned().unwrap_or_default();
    if let Some(effort) = config.get("effort").filter(|effort| !effort.is_null()) {
        fields.insert("reasoning_effort".to_owned(), effort.clone());
    }
    constrain(&mut fields, &config["format"]);
    ONLY_MESSAGES.iter().for_each(|name| drop(fields.remove(*name)));
    Ok(fields)
}

fn system_text(system: &Value) -> String {
    match system {
        Value::String(text) => text.clone(),
        blocks => {
            let texts = blocks.as_array().into_iter().flatten().map(|block| text_of(&block["text"]));
            texts.filter(|text| !text.starts_with(BILLING)).collect()
        }
    }
}

/// A message's blocks become parts and calls of tools; results of tools are messages of their own, before it.
fn push_message(message: &Value, messages: &mut Vec<Value>) -> Result<(), Unsound> {
    let blocks = match &message["content"] {
        Value::String(text) => {
            messages.push(json!({ "role": message["role"], "content": text }));
            return Ok(());
        }
        blocks => blocks.as_array().map(Vec::as_slice).unwrap_or_default(),
    };
    let (mut parts, mut calls, mut thought) = (Vec::new(), Vec::new(), String::new());
    for block in blocks {
        match text_of(&block["type"]) {
            "text" if text_of(&block["text"]).is_empty() => {}
            "text" => parts.push(text_part(&block["text"])),
            "image" => parts.push(image_part(&block["source"])?),
            "thinking" => thought.push_str(text_of(&block["thinking"])),
            "redacted_thinking" => {}
            "tool_use" => {
                let arguments = block["input"].to_string();
                calls.push(call(&block["id"], &block["name"], arguments.into()));
            }
            "tool_result" => {
                let content = result_text(&block["content"])?;
                messages.push(json!({ "role": "tool", "tool_call_id": block["tool_use_id"], "content": content }));
            }
            _ => return Err(Unsound("its messages have parts that a chat does not have")),
        }
    }
    let mut said = json!({ "role": message["role"] });
    if !thought.is_empty() {
        said["reasoning"] = thought.into();
    }
    if !calls.is_empty() {
        said["tool_calls"] = calls.into();
    }
    if let Some(content) = content_of(parts) {
        said["content"] = content;
    } else if message["role"] == "user" {
        return Ok(());
    }
    messages.push(said);
    Ok(())
}

/// A single text as such, which all templates read.
fn content_of(mut parts: Vec<Value>) -> Option<Value> {
    match parts.len() {
        0 => None,
        1 if parts[0]["type"] == "text" => Some(parts.remove(0)["text"].take()),
        _ => Some(parts.into()),
    }
}

fn result_text(content: &Value) -> Result<String, Unsound> {
    let Value::Array(parts) = content else { return Ok(text_of(content).to_owned()) };
    if parts.iter().any(|part| part["type"] != "text") {
        return Err(Unsound("results of its tools are no plain text"));
    }
    let texts: Vec<&str> = parts.iter().map(|part| text_of(&part["text"])).collect();
    Ok(texts.join("\n"))
}

fn text_part(text: &Value) -> Value {
    json!({ "type": "text", "text": text })
}

fn image_part(source: &Value) -> Result<Value, Unsound> {
    let url = match text_of(&source["type"]) {
        "url" => text_of(&source["url"]).to_owned(),
        "base64" => format!("data:{};base64,{}", text_of(&source["media_type"]), text_of(&source["data"])),
        _ => return Err(Unsound("its messages have parts that a chat does not have")),
    };
    Ok(json!({ "type": "image_url", "image_url": { "url": url } }))
}

fn call(id: &Value, name: &Value, arguments: Value) -> Value {
    json!({ "type": "function", "id": id, "function": { "name": name, "arguments": arguments } })
}

/// A tool that the client runs; others are the server's.
fn tool_of_message(tool: &Value) -> Option<Value> {
    let schema = tool.get("input_schema")?;
    let mut function = json!({ "name": tool["name"], "parameters": schema });
    for name in ["description", "strict"] {
        if let Some(value) = tool.get(name) {
            function[name] = value.clone();
        }
    }
    Some(json!({ "type": "function", "function": function }))
}

fn of_response(mut fields: Fields) -> Result<Fields, Unsound> {
    if fields.get("prompt").is_some_and(|prompt| !prompt.is_null()) {
        return Err(Unsound("its prompt is kept elsewhere"));
    }
    if fields.get("truncation").is_some_and(|truncation| truncation == "auto") {
        return Err(Unsound("its prompt may be truncated, and a longer one would be truncated elsewhere"));
    }
    let has_logprobs =
        |include: &Value| include.as_array().is_some_and(|names| names.iter().any(|name| text_of(name).ends_with("logprobs")));
    if fields.get("include").is_some_and(has_logprobs) {
        return Err(Unsound("log probabilities within a response are not told again"));
    }
    let mut messages = Vec::new();
    if let Some(instructions) = fields.get("instructions").and_then(Value::as_str).filter(|text| !text.is_empty()) {
        messages.push(json!({ "role": "system", "content": instructions }));
    }
    match fields.get("input") {
        Some(Value::Array(items)) => items.iter().try_for_each(|item| push_item(item, &mut messages))?,
        input => messages.push(json!({ "role": "user", "content": input })),
    }
    fields.insert("messages".to_owned(), messages.into());
    if let Some(Value::Array(tools)) = fields.get("tools") {
        let tools: Option<Vec<Value>> = tools.iter().map(tool_of_response).collect();
        let tools = tools.ok_or(Unsound("it offers tools that a chat does not have"))?;
        fields.insert("tools".to_owned(), tools.into());
    }
    if let Some(choice) = fields.get("tool_choice").filter(|choice| choice.is_object()) {
        if choice["type"] != "function" {
            return Err(Unsound("it chooses among its tools in a way that a chat does not have"));
        }
        let named = json!({ "type": "function", "function": { "name": choice["name"] } });
        fields.insert("tool_choice".to_owned(), named);
    }
    if let Some(most) = fields.get("max_output_tokens").filter(|most| !most.is_null()).cloned() {
        fields.insert("max_tokens".to_owned(), most);
    }
    if let Some(effort) = fields.get("reasoning").and_then(|reasoning| reasoning.get("effort")).cloned() {
        fields.insert("reasoning_effort".to_owned(), effort);
    }
    let format = fields.get("text").map(|text| text["format"].clone()).unwrap_or_default();
    constrain(&mut fields, &format);
    ONLY_RESPONSES.iter().for_each(|name| drop(fields.remove(*name)));
    Ok(fields)
}

/// An item becomes a message, or part of the assistant's last one.
fn push_item(item: &Value, messages: &mut Vec<Value>) -> Result<(), Unsound> {
    let unknown = Unsound("its input has items that a chat does not have");
    let is_of_last = |messages: &[Value], name: &str| {
        messages.last().is_some_and(|last| last["role"] == "assistant" && last.get(name).is_none())
    };
    let add = |messages: &mut Vec<Value>, name: &str, value: Value| {
        if !is_of_last(messages, name) {
            messages.push(json!({ "role": "assistant" }));
        }
        if let Some(last) = messages.last_mut() {
            last[name] = value;
        }
    };
    match text_of(&item["type"]) {
        "function_call" => {
            let called = call(&item["call_id"], &item["name"], item["arguments"].clone());
            let calls = messages.last_mut().filter(|last| last["role"] == "assistant");
            match calls.and_then(|last| last.get_mut("tool_calls")?.as_array_mut()) {
                Some(calls) => calls.push(called),
                None => add(messages, "tool_calls", json!([called])),
            }
        }
        "function_call_output" => {
            let output = item["output"].as_str().ok_or(Unsound("results of its tools are no plain text"))?;
            messages.push(json!({ "role": "tool", "tool_call_id": item["call_id"], "content": output }));
        }
        "reasoning" => {
            let of = |name: &str| item[name].get(0).and_then(|part| part["text"].as_str());
            let text = of("content").or_else(|| of("summary")).ok_or(unknown)?;
            add(messages, "reasoning", text.into());
        }
        "message" | "" if item["role"] == "assistant" => {
            let text: String = match &item["content"] {
                Value::Array(parts) => parts.iter().map(|part| text_of(&part["text"])).collect(),
                text => text_of(text).to_owned(),
            };
            add(messages, "content", text.into());
        }
        "message" | "" if item["role"].is_string() => {
            let content = match &item["content"] {
                Value::Array(parts) => parts.iter().map(part_of_item).collect::<Option<Vec<_>>>().ok_or(unknown)?.into(),
                text => text.clone(),
            };
            messages.push(json!({ "role": item["role"], "content": content }));
        }
        _ => return Err(unknown),
    }
    Ok(())
}

fn part_of_item(part: &Value) -> Option<Value> {
    match text_of(&part["type"]) {
        "input_text" | "text" => Some(text_part(&part["text"])),
        "input_image" if part["image_url"].is_string() => {
            Some(json!({ "type": "image_url", "image_url": { "url": part["image_url"] } }))
        }
        _ => None,
    }
}

/// A function; other tools are the server's.
fn tool_of_response(tool: &Value) -> Option<Value> {
    let mut function = tool.as_object()?.clone();
    let is_function = function.remove("type")? == "function";
    is_function.then(|| json!({ "type": "function", "function": function }))
}

/// What the output is held to. Of a schema a chat says all but the type in a field of its own, and always has a name for it.
fn constrain(fields: &mut Fields, format: &Value) {
    let Some(mut schema) = format.as_object().cloned() else { return };
    let said = match text_of(&format["type"]) {
        "text" => return,
        "json_schema" => {
            schema.remove("type");
            schema.entry("name").or_insert_with(|| "output".into());
            json!({ "type": "json_schema", "json_schema": schema })
        }
        _ => schema.into(),
    };
    fields.insert("response_format".to_owned(), said);
}
