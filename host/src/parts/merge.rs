//! Several answers of one choice each made into one: each choice under its own index, one id, one usage, one end.
//!
//! Usage is summed up as engines do it for a request of several choices (SGLang's `UsageProcessor`): what is said of a prompt counts once for each
//! prompt, as its first choice has it; all else is added. Frames that hold a part's count so far (`continuous_usage_stats`) pass as they
//! are, since engines, too, say there what that choice has.

use bytes::Bytes;
use dynamo_engine_api::sse::DONE_FRAME;
use serde_json::{Map, Value, json};

/// What all frames of a stream have in common.
const OF_ALL: [&str; 3] = ["id", "created", "model"];

/// Several answers that become one.
pub(super) struct Merge {
    /// Choices of each prompt.
    choices: usize,
    /// What the first frame had of [`OF_ALL`].
    head: Option<Map<String, Value>>,
    /// Of each part, whether it said that it is done.
    done: Vec<bool>,
    /// The event that tells the usage, as one part had it, if one came.
    counted: Option<Map<String, Value>>,
    usage: Map<String, Value>,
}

impl Merge {
    /// Of so many parts.
    pub(super) fn new(choices: usize, parts: usize) -> Self {
        Self { choices, head: None, done: vec![false; parts], counted: None, usage: Map::new() }
    }

    /// Whether a part said that it is done.
    pub(super) fn is_done(&self, part: usize) -> bool {
        self.done[part]
    }

    /// Whole answers as one. `None`: one of them is no answer.
    pub(super) fn whole(&self, answers: &[Bytes]) -> Option<Bytes> {
        let (mut all, mut choices, mut usage) = (None, Vec::new(), Map::new());
        for (part, answer) in answers.iter().enumerate() {
            let mut answer: Map<String, Value> = serde_json::from_slice(answer).ok()?;
            let mut made = answer.remove("choices")?;
            number(&mut made, part);
            choices.append(made.as_array_mut()?);
            if let Some(Value::Object(said)) = answer.get("usage") {
                self.add(&mut usage, said, part);
            }
            all.get_or_insert(answer);
        }
        let mut all = all?;
        all.insert("choices".to_owned(), choices.into());
        if !usage.is_empty() {
            all.insert("usage".to_owned(), usage.into());
        }
        Some(Value::Object(all).to_string().into())
    }

    /// A part's frames as frames of the whole, and whether one of them tells of an error. What each part says at its end is kept for
    /// the end of all.
    pub(super) fn frames(&mut self, part: usize, frames: &[u8]) -> (Bytes, bool) {
        let mut out = Vec::with_capacity(frames.len());
        for line in frames.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii_end).filter(|line| !line.is_empty()) {
            let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else {
                // A sign of life.
                out.extend_from_slice(&[line, b"\n\n"].concat());
                continue;
            };
            if data == b"[DONE]" {
                self.done[part] = true;
                continue;
            }
            let Ok(frame) = serde_json::from_slice::<Map<String, Value>>(data) else {
                out.extend_from_slice(&[line, b"\n\n"].concat());
                continue;
            };
            if frame.get("error").is_some_and(|error| !error.is_null()) {
                push(&mut out, frame);
                return (out.into(), true);
            }
            if let Some(frame) = self.frame(part, frame) {
                push(&mut out, frame);
            }
        }
        (out.into(), false)
    }

    fn frame(&mut self, part: usize, mut frame: Map<String, Value>) -> Option<Map<String, Value>> {
        let is_last = frame.get("choices").and_then(Value::as_array).is_some_and(Vec::is_empty);
        if is_last && let Some(Value::Object(said)) = frame.get("usage") {
            let mut usage = std::mem::take(&mut self.usage);
            self.add(&mut usage, said, part);
            self.usage = usage;
            self.counted = Some(frame);
            return None;
        }
        if let Some(choices) = frame.get_mut("choices") {
            number(choices, part);
        }
        self.as_of_all(&mut frame);
        Some(frame)
    }

    /// The last frames, when all parts are done.
    pub(super) fn end(&mut self) -> Bytes {
        let mut out = Vec::new();
        if let Some(mut counted) = self.counted.take() {
            counted.insert("usage".to_owned(), std::mem::take(&mut self.usage).into());
            self.as_of_all(&mut counted);
            push(&mut out, counted);
        }
        out.extend_from_slice(DONE_FRAME);
        out.into()
    }

    fn as_of_all(&mut self, frame: &mut Map<String, Value>) {
        let of_frame = |frame: &Map<String, Value>| {
            OF_ALL.iter().filter_map(|name| Some(((*name).to_owned(), frame.get(*name)?.clone()))).collect()
        };
        let head = self.head.get_or_insert_with(|| of_frame(frame));
        frame.extend(head.iter().map(|(name, value)| (name.clone(), value.clone())));
    }

    /// Adds what a part used.
    fn add(&self, usage: &mut Map<String, Value>, said: &Map<String, Value>, part: usize) {
        let is_first = part.is_multiple_of(self.choices);
        for (name, value) in said.iter().filter(|(name, _)| is_first || !name.starts_with("prompt_")) {
            add(usage.entry(name.clone()).or_insert(Value::Null), value);
        }
        let of = |name: &str| usage.get(name).and_then(Value::as_u64).unwrap_or(0);
        let total = of("prompt_tokens") + of("completion_tokens");
        usage.insert("total_tokens".to_owned(), total.into());
    }
}

/// Adds numbers up, in objects too.
fn add(sum: &mut Value, value: &Value) {
    match (sum, value) {
        (Value::Object(sum), Value::Object(value)) => {
            value.iter().for_each(|(name, value)| add(sum.entry(name.clone()).or_insert(Value::Null), value));
        }
        (sum @ Value::Number(_), Value::Number(_)) => {
            *sum = json!(sum.as_u64().unwrap_or(0).saturating_add(value.as_u64().unwrap_or(0)));
        }
        (sum @ Value::Null, value) => *sum = value.clone(),
        _ => {}
    }
}

/// Numbers the choice of a part.
fn number(choices: &mut Value, part: usize) {
    for choice in choices.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        choice.insert("index".to_owned(), part.into());
    }
}

fn push(out: &mut Vec<u8>, frame: Map<String, Value>) {
    out.extend_from_slice(format!("data: {}\n\n", Value::Object(frame)).as_bytes());
}

/// The error that an engine answered as a whole, as the event that ends a stream.
pub(super) fn error_event(body: &[u8]) -> Bytes {
    let error = match serde_json::from_slice::<Map<String, Value>>(body) {
        Ok(error) if error.contains_key("error") => Value::Object(error),
        Ok(error) => json!({ "error": error }),
        Err(_) => {
            json!({ "error": { "message": String::from_utf8_lossy(body), "type": "server_error", "param": null, "code": null } })
        }
    };
    format!("data: {error}\n\n").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(prompt: u64, output: u64, cached: u64) -> Value {
        json!({
            "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output, "reasoning_tokens": 1,
            "prompt_tokens_details": { "cached_tokens": cached }, "completion_tokens_details": null,
        })
    }

    fn frame(id: &str, said: Value) -> String {
        let mut frame = json!({ "id": id, "created": 7, "model": "m", "object": "text_completion", "choices": [] });
        frame.as_object_mut().unwrap().extend(said.as_object().unwrap().clone());
        format!("data: {frame}\n\n")
    }

    fn events(frames: &[u8]) -> Vec<Value> {
        let text = std::str::from_utf8(frames).unwrap();
        text.split_terminator("\n\n").map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }

    #[test]
    fn whole_answers_become_one_whose_prompts_are_counted_once() {
        let answer = |id: &str, text: &str, usage: Value| {
            let choice = json!({ "index": 0, "text": text, "finish_reason": "stop", "logprobs": { "token_logprobs": [-0.25] } });
            Bytes::from(json!({ "id": id, "created": 7, "choices": [choice], "usage": usage }).to_string())
        };
        // Two prompts of two choices.
        let answers = [("a", 4, 1), ("b", 4, 2), ("c", 9, 3), ("d", 9, 4)];
        let answers: Vec<Bytes> = answers.map(|(id, prompt, output)| answer(id, id, usage(prompt, output, prompt / 2))).to_vec();
        let made = Merge::new(2, 4).whole(&answers).unwrap();
        let made: Value = serde_json::from_slice(&made).unwrap();
        let choices = made["choices"].as_array().unwrap();
        let said: Vec<_> =
            choices.iter().map(|choice| (choice["index"].as_u64().unwrap(), choice["text"].as_str().unwrap())).collect();
        assert_eq!(said, [(0, "a"), (1, "b"), (2, "c"), (3, "d")]);
        assert_eq!((&made["id"], &choices[3]["logprobs"]["token_logprobs"][0]), (&json!("a"), &json!(-0.25)));
        let expected = json!({
            "prompt_tokens": 13, "completion_tokens": 10, "total_tokens": 23, "reasoning_tokens": 4,
            "prompt_tokens_details": { "cached_tokens": 6 }, "completion_tokens_details": null,
        });
        assert_eq!(made["usage"], expected);
        assert_eq!(Merge::new(1, 2).whole(&[answers[0].clone(), Bytes::from_static(b"[]")]), None);
    }

    #[test]
    fn streams_become_one_with_one_id_one_usage_and_one_end() {
        let mut merge = Merge::new(2, 2);
        let said = |text: &str, finish: Value| json!({ "choices": [{ "index": 0, "text": text, "finish_reason": finish }] });
        let (first, _) = merge.frames(1, frame("b", said("x", Value::Null)).as_bytes());
        let (second, _) = merge.frames(0, frame("a", said("y", "stop".into())).as_bytes());
        let seen: Vec<Value> = [first, second].iter().flat_map(|frames| events(frames)).collect();
        assert_eq!((&seen[0]["choices"][0]["index"], &seen[1]["choices"][0]["index"]), (&json!(1), &json!(0)));
        assert!(seen.iter().all(|event| event["id"] == "b" && event["object"] == "text_completion"), "{seen:?}");
        for (part, id, output) in [(0, "a", 3), (1, "b", 4)] {
            assert!(!merge.is_done(part));
            let last = frame(id, json!({ "usage": usage(5, output, 0) })) + "data: [DONE]\n\n";
            assert_eq!(merge.frames(part, last.as_bytes()), (Bytes::new(), false));
            assert!(merge.is_done(part));
        }
        let end = merge.end();
        let counted = events(end.strip_suffix(DONE_FRAME).unwrap());
        assert_eq!((counted.len(), &counted[0]["id"], &counted[0]["choices"]), (1, &json!("b"), &json!([])));
        assert_eq!(counted[0]["usage"]["total_tokens"], 12);
        assert_eq!(Merge::new(2, 2).end(), DONE_FRAME, "nobody asked for the usage");
    }

    #[test]
    fn errors_are_told_and_signs_of_life_pass() {
        let mut merge = Merge::new(2, 2);
        assert_eq!(merge.frames(0, b": ping\r\n\r\n"), (Bytes::from_static(b": ping\n\n"), false));
        let (frames, is_error) = merge.frames(1, b"data: {\"error\":{\"message\":\"no\"}}\n\ndata: [DONE]\n\n");
        assert_eq!((&frames[..], is_error, merge.is_done(1)), (&b"data: {\"error\":{\"message\":\"no\"}}\n\n"[..], true, false));
        assert!(error_event(b"{\"error\":{\"message\":\"no\"}}").starts_with(b"data: {\"error\":{\"message\":\"no\"}}"));
        assert!(error_event(b"{\"object\":\"error\",\"message\":\"no\"}").starts_with(b"data: {\"error\":{\"message\":\"no\""));
        assert!(error_event(b"what").starts_with(b"data: {\"error\":{\"code\":null,\"message\":\"what\""));
    }
}
