use bytes::Bytes;
use dynamo_engine_api::{ChatContinuation, Continues, Endpoint, sse::Framer};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    ask::{Ask, Next, Original},
    record::{Choice, Record, Stage},
    seam::Seam,
    splice::Splice,
};

/// Streams of a real vLLM 0.32, asked for ids, and of a real llama.cpp server.
const VLLM_CHAT: &str = include_str!("fixtures/vllm_chat_ids.sse");
const VLLM_COMPLETION: &str = include_str!("fixtures/vllm_completion_ids.sse");
const LLAMACPP_CHAT: &str = include_str!("fixtures/llamacpp_chat.sse");

const VLLM: Continues = Continues { gives_ids: true, takes_ids: true, chat: Some(ChatContinuation::FinalMessage) };
const LLAMACPP: Continues = Continues { gives_ids: false, takes_ids: true, chat: Some(ChatContinuation::Prefill) };
const PLAIN: Continues = Continues { gives_ids: false, takes_ids: false, chat: None };

/// What a client has of a stream that was read in pieces and cut off.
fn recorded(stream: &str, reads: &[usize], cut: usize) -> Record {
    let (mut framer, mut record) = (Framer::default(), Record::new(Endpoint::ChatCompletions, 1 << 20));
    let mut rest = &stream.as_bytes()[..cut];
    for read in reads.iter().cycle() {
        let (now, later) = rest.split_at((*read).min(rest.len()));
        if let Some(chunk) = framer.push(Bytes::copy_from_slice(now)).unwrap() {
            record.keep(&chunk.bytes);
        }
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    record.fold();
    record
}

fn whole(stream: &str) -> Choice {
    recorded(stream, &[stream.len()], stream.len()).said.choices.remove(&0).unwrap()
}

fn original(endpoint: Endpoint, body: &Value) -> Original {
    let is_guided = body.get("response_format").is_some();
    Original::read(endpoint, body.to_string().as_bytes(), is_guided, body.get("tools").is_some(), false).ok().unwrap()
}

fn asked(original: &Original, index: u32, choice: &Choice, engine: Continues) -> (Ask, Value) {
    match original.next(index, choice, engine, Some(4096)) {
        Ok(Next::Ask(ask)) => {
            let body = serde_json::from_slice(&ask.body).unwrap();
            (ask, body)
        }
        Ok(Next::Full) => panic!("it is full"),
        Err(unsound) => panic!("{}", unsound.0),
    }
}

fn chat(more: Value) -> Value {
    let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }], "stream": true });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// A choice of which the client has this text.
fn of_text(text: &str) -> Choice {
    let mut choice = Choice::new();
    choice.take(text, &[], None);
    choice
}

fn of_ids(texts: &[(&str, u32)]) -> Choice {
    let mut choice = Choice::new();
    choice.prompt_ids = Some(vec![1, 2]);
    for (text, id) in texts {
        choice.take(text, &[*id], None);
    }
    choice
}

#[test]
fn captured_streams_are_recorded_as_they_were() {
    let vllm = whole(VLLM_CHAT);
    assert_eq!(vllm.text, "index paths '*******************\\.replace");
    assert_eq!(
        (vllm.ids.as_slice(), vllm.tokens, vllm.is_finished, vllm.has_role),
        (&[2499, 3465, 13225, 2454][..], 4, true, true)
    );
    assert_eq!(vllm.all_ids().unwrap().len(), 12 + 4);
    let completion = whole(VLLM_COMPLETION);
    assert_eq!(completion.all_ids().unwrap(), [16382, 482, 198, 100, 200, 300, 16383, 11260, 15988, 14966]);
    let llamacpp = whole(LLAMACPP_CHAT);
    assert_eq!((llamacpp.text.as_str(), llamacpp.tokens), ("index paths '*******************\\.replaceare", 5));
    assert!(llamacpp.all_ids().is_none() && llamacpp.is_finished);
}

proptest! {
    /// A stream that is cut anywhere, and gone on with from there, has the text, ids and count of one that was not.
    #[test]
    fn a_stream_cut_anywhere_and_gone_on_with_is_whole(reads in prop::collection::vec(1usize..300, 1..8), cut in 0.0..1.0f64) {
        let head = json!({ "id": "other", "object": "text_completion", "created": 9, "model": "other" });
        for (stream, endpoint, engine) in
            [(VLLM_CHAT, Endpoint::ChatCompletions, VLLM), (VLLM_COMPLETION, Endpoint::Completions, VLLM), (LLAMACPP_CHAT, Endpoint::ChatCompletions, LLAMACPP)]
        {
            let all = whole(stream);
            let mut record = recorded(stream, &reads, (stream.len() as f64 * cut) as usize);
            let mut choice = record.said.choices.remove(&0).unwrap_or_else(Choice::new);
            choice.settle();
            prop_assert!(all.text.starts_with(&choice.text));
            if choice.is_finished {
                prop_assert_eq!(&choice.text, &all.text);
                continue;
            }
            let body = match endpoint {
                Endpoint::Completions => json!({ "model": "m", "prompt": [16382, 482, 198, 100, 200, 300, 16383], "max_tokens": all.tokens }),
                _ => chat(json!({ "max_tokens": all.tokens })),
            };
            let original = original(endpoint, &body);
            let splice = Splice::new(endpoint, &record.said, 1, 1, false, 12);
            if choice.tokens == all.tokens {
                prop_assert!(matches!(original.next(0, &choice, engine, None), Ok(Next::Full)));
                continue;
            }
            let (ask, asked) = asked(&original, 0, &choice, engine);
            let left = if ask.form == "anew" { all.tokens } else { all.tokens - choice.tokens };
            prop_assert_eq!(asked["max_tokens"].as_u64(), Some(u64::from(left)));
            let done = choice.ids.len();
            let mut seam = ask.seam;
            let mut frames = Vec::new();
            // The other engine says the rest, token by token.
            let pieces: Vec<(String, Vec<u32>)> = if ask.is_by_ids {
                prop_assert_eq!(asked["prompt"].as_array().unwrap().len(), choice.all_ids().unwrap().len());
                let texts = texts_of(stream);
                all.ids[done..].iter().zip(&texts[done..]).map(|(id, text)| (text.clone(), vec![*id])).collect()
            } else {
                let rest = &all.text[choice.text.len()..];
                rest.chars().map(|c| (c.to_string(), vec![])).collect()
            };
            let count = pieces.len();
            for (at, (text, ids)) in pieces.into_iter().enumerate() {
                let reason = if at + 1 == count { json!("length") } else { Value::Null };
                let said = if ask.endpoint == Endpoint::Completions {
                    json!({ "index": 0, "text": text, "finish_reason": reason, "token_ids": ids })
                } else {
                    json!({ "index": 0, "delta": { "role": if at == 0 { json!("assistant") } else { Value::Null }, "content": text }, "finish_reason": reason })
                };
                let mut frame = head.clone();
                frame["choices"] = json!([said]);
                let frame = format!("data: {frame}\n\n");
                frames.extend(splice.frames(frame.as_bytes(), 0, &mut choice, &mut seam, ask.is_by_ids).frames);
            }
            prop_assert!(count == 0 || choice.is_finished);
            if count > 0 {
                prop_assert_eq!(&choice.text, &all.text);
            }
            if ask.is_by_ids {
                prop_assert_eq!(&choice.ids, &all.ids);
                prop_assert_eq!(choice.tokens, all.tokens);
            }
            // What the client reads of it is one stream.
            let said = String::from_utf8(frames).unwrap();
            let mut roles = 0;
            for line in said.lines().filter_map(|line| line.strip_prefix("data: ")) {
                let event: Value = serde_json::from_str(line).unwrap();
                roles += u32::from(event["choices"][0]["delta"]["role"].is_string());
                prop_assert!(event["choices"][0]["token_ids"].is_null());
                if let Some(id) = record.said.head.get("id") {
                    prop_assert_eq!(&event["id"], id);
                }
            }
            prop_assert!(roles <= 1);
        }
    }
}

/// The text of each token of a captured stream that has one.
fn texts_of(stream: &str) -> Vec<String> {
    let events = stream.lines().filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
    let texts = events.filter_map(|event| {
        let choice = event["choices"].get(0)?.clone();
        choice["token_ids"].as_array()?;
        choice["text"].as_str().or(choice["delta"]["content"].as_str()).map(str::to_owned)
    });
    texts.collect()
}

#[test]
fn ids_are_gone_on_with_at_completions_without_what_is_a_chats() {
    let body =
        chat(json!({ "max_completion_tokens": 10, "min_tokens": 4, "temperature": 0, "chat_template": "x", "n": 1, "seed": 7 }));
    let (ask, asked) = asked(&original(Endpoint::ChatCompletions, &body), 0, &of_ids(&[("a", 5), ("b", 6)]), VLLM);
    assert_eq!((ask.endpoint, ask.form), (Endpoint::Completions, "ids"));
    let expected = json!({
        "model": "m", "prompt": [1, 2, 5, 6], "max_tokens": 8, "min_tokens": 2, "temperature": 0, "seed": 7,
        "stream": true, "stream_options": { "include_usage": true }
    });
    assert_eq!(asked, expected);
}

#[test]
fn without_a_limit_what_the_context_leaves_is_asked_for() {
    let original = original(Endpoint::ChatCompletions, &chat(json!({})));
    let choice = of_ids(&[("a", 5)]);
    let (_, by_ids) = asked(&original, 0, &choice, VLLM);
    assert_eq!(by_ids["max_tokens"], 4096 - 3);
    let Ok(Next::Ask(unknown)) = original.next(0, &choice, VLLM, None) else { panic!("it goes on") };
    assert_eq!(unknown.form, "chat", "a completion would end at its own default");
    let Ok(Next::Full) = original.next(0, &choice, VLLM, Some(3)) else { panic!("there is no room") };
}

#[test]
fn a_completion_without_a_limit_has_the_engines_own() {
    let original = original(Endpoint::Completions, &json!({ "model": "m", "prompt": "p", "stream": true }));
    let ids = |count: u32| of_ids(&(0..count).map(|id| ("a", id)).collect::<Vec<_>>());
    let (ask, by_ids) = asked(&original, 0, &ids(5), VLLM);
    assert_eq!((ask.form, &by_ids["max_tokens"]), ("ids", &json!(11)));
    let (ask, by_text) = asked(&original, 0, &of_text("a"), VLLM);
    assert_eq!((ask.form, &by_text["max_tokens"]), ("text", &json!(15)));
    assert!(matches!(original.next(0, &ids(16), VLLM, None), Ok(Next::Full)));
    // An engine with another limit began.
    let (_, beyond) = asked(&original, 0, &ids(17), VLLM);
    assert_eq!(beyond["max_tokens"], 4096 - 2 - 17);
    let (_, plain) = asked(&original, 0, &of_text("a"), PLAIN);
    assert!(plain.get("max_tokens").is_none());
}

#[test]
fn a_character_of_several_tokens_is_made_by_one_engine() {
    let mut choice = of_ids(&[("a", 5), ("", 6), ("", 7)]);
    choice.settle();
    assert_eq!((choice.ids.as_slice(), choice.tokens), (&[5][..], 1));
    let (_, by_ids) = asked(&original(Endpoint::ChatCompletions, &chat(json!({ "max_tokens": 4 }))), 0, &choice, VLLM);
    assert_eq!((&by_ids["prompt"], &by_ids["max_tokens"]), (&json!([1, 2, 5]), &json!(3)));
    let mut whole = of_ids(&[("a", 5), ("", 6), ("é", 7)]);
    whole.settle();
    assert_eq!(whole.all_ids().unwrap(), [1, 2, 5, 6, 7]);
}

#[test]
fn a_chat_is_gone_on_with_as_its_engine_takes_it() {
    let body = chat(json!({ "max_tokens": 10, "stop": ["END"] }));
    let original = original(Endpoint::ChatCompletions, &body);
    let message = |content: &str| json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": content }]);
    // Where text is held back, ids are ahead of it.
    let (_, vllm) = asked(&original, 0, &of_ids(&[("so ", 5)]), VLLM);
    assert_eq!((&vllm["messages"], &vllm["max_tokens"]), (&message("so"), &json!(9)));
    assert_eq!((&vllm["continue_final_message"], &vllm["add_generation_prompt"]), (&json!(true), &json!(false)));
    let (_, llamacpp) = asked(&original, 0, &of_text("so "), LLAMACPP);
    assert_eq!(llamacpp["messages"], message("so "));
    assert!(llamacpp.get("continue_final_message").is_none());
    assert!(original.next(0, &of_text("so "), PLAIN, None).is_err());
}

#[test]
fn an_answer_that_the_client_has_begun_itself_goes_on() {
    let begun = json!({
        "continue_final_message": true, "add_generation_prompt": false,
        "messages": [{ "role": "user", "content": "hi" }, { "role": "assistant", "content": "I" }]
    });
    let original = original(Endpoint::ChatCompletions, &chat(begun));
    let (_, asked) = asked(&original, 0, &of_text(" say"), VLLM);
    assert_eq!(asked["messages"][1]["content"], "I say");
}

#[test]
fn a_completion_is_gone_on_with_by_its_text_prompt_by_prompt() {
    let body = json!({ "model": "m", "prompt": ["one", "two"], "n": 2, "max_tokens": 5, "stream": true });
    let original = original(Endpoint::Completions, &body);
    assert_eq!((original.prompts(), original.prompt_of(3)), (2, 1));
    let (ask, asked) = asked(&original, 3, &of_text(" three"), PLAIN);
    assert_eq!((ask.form, &asked["prompt"], &asked["max_tokens"]), ("text", &json!("two three"), &json!(4)));
    assert!(asked.get("n").is_none());
    let ids = json!({ "model": "m", "prompt": [1, 2], "stream": true });
    assert!(self::original(Endpoint::Completions, &ids).next(0, &of_text("x"), PLAIN, None).is_err());
}

#[test]
fn what_was_not_begun_is_asked_for_anew() {
    for more in
        [json!({ "response_format": { "type": "json_object" } }), json!({ "tools": [{}], "n": 2 }), json!({ "logprobs": true })]
    {
        let (ask, asked) = asked(&original(Endpoint::ChatCompletions, &chat(more.clone())), 1, &Choice::new(), PLAIN);
        assert_eq!((ask.form, asked.get("n")), ("anew", None));
        assert_eq!(asked["messages"], chat(more)["messages"]);
    }
}

#[test]
fn what_cannot_go_on_soundly_says_why() {
    let mut reasoning = Choice::new();
    reasoning.take("", &[5], Some(Stage::Reasoning));
    let mut calling = of_ids(&[("a", 5)]);
    calling.take("", &[6], Some(Stage::ToolCall));
    calling.take("b", &[7], None);
    let cases = [
        (json!({}), &reasoning, "reasoning"),
        (json!({}), &calling, "call of a tool"),
        (json!({ "response_format": { "type": "json_object" } }), &of_ids(&[("{", 5)]), "grammar"),
        (json!({ "tools": [{}], "tool_choice": "required" }), &of_ids(&[("x", 5)]), "grammar"),
        (json!({ "prompt_logprobs": 1 }), &of_ids(&[("x", 5)]), "log probabilities"),
    ];
    for (more, choice, reason) in cases {
        let refused = original(Endpoint::ChatCompletions, &chat(more.clone())).next(0, choice, VLLM, Some(4096)).err();
        assert!(refused.is_some_and(|refused| refused.0.contains(reason)), "{more}");
    }
    for more in [json!({ "echo": true }), json!({ "suffix": "." }), json!({ "logprobs": 2 })] {
        let mut body = json!({ "model": "m", "prompt": "p" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert!(original(Endpoint::Completions, &body).next(0, &of_text("x"), VLLM, None).is_err(), "{body}");
    }
    // Past its reasoning an answer is text again, and offered tools do not matter to a chat.
    let mut reasoned = of_ids(&[]);
    reasoned.take("", &[5], Some(Stage::Reasoning));
    reasoned.take("so", &[6], None);
    let (ask, _) = asked(&original(Endpoint::ChatCompletions, &chat(json!({}))), 0, &reasoned, VLLM);
    assert_eq!(ask.form, "ids");
    // A chat is not told what was reasoned, and would have it reasoned again.
    for text in ["so", "\n"] {
        let mut reasoned = Choice::new();
        reasoned.take("", &[], Some(Stage::Reasoning));
        reasoned.take(text, &[], None);
        let refused = original(Endpoint::ChatCompletions, &chat(json!({}))).next(0, &reasoned, VLLM, None).err();
        assert!(refused.is_some_and(|refused| refused.0.contains("reasoned")), "{text:?}");
    }
    let (ask, asked) =
        asked(&original(Endpoint::ChatCompletions, &chat(json!({ "tools": [{}] }))), 0, &of_ids(&[("so", 5)]), VLLM);
    assert_eq!((ask.form, &asked["tools"]), ("chat", &json!([{}])));
}

#[test]
fn a_choice_that_has_all_its_tokens_ends_where_it_is() {
    let original = original(Endpoint::ChatCompletions, &chat(json!({ "max_tokens": 2 })));
    let mut choice = of_ids(&[("a", 5), ("b", 6)]);
    assert!(matches!(original.next(0, &choice, VLLM, None), Ok(Next::Full)));
    let splice = Splice::new(Endpoint::ChatCompletions, &Record::new(Endpoint::Completions, 1).said, 1, 1, false, 7);
    splice.tally.output(0, 2);
    let frames = String::from_utf8(splice.full(0, &mut choice)).unwrap();
    assert!(frames.contains("\"finish_reason\":\"length\"") && choice.is_finished, "{frames}");
    let end = String::from_utf8(splice.end(true).to_vec()).unwrap();
    let usage = json!({ "prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9 });
    assert_eq!(end, format!("data: {}\n\ndata: [DONE]\n\n", json!({ "choices": [], "usage": usage })));
}

#[test]
fn a_stop_string_across_the_seam_ends_the_stream_there() {
    let splice = Splice::new(Endpoint::Completions, &Record::new(Endpoint::Completions, 1).said, 1, 1, false, 7);
    let mut choice = of_text("the E");
    let mut seam = Seam::new(&choice.text, 0, &["END".to_owned()], false);
    let frame = |text: &str| format!("data: {}\n\n", json!({ "choices": [{ "index": 0, "text": text, "finish_reason": null }] }));
    let held = splice.frames(frame("N").as_bytes(), 0, &mut choice, &mut seam, false);
    assert!(held.frames.is_empty() && !held.is_stopped);
    let stopped = splice.frames(frame("D!").as_bytes(), 0, &mut choice, &mut seam, false);
    let said = String::from_utf8(stopped.frames).unwrap();
    assert!(
        stopped.is_stopped && said.contains("\"finish_reason\":\"stop\"") && said.contains("\"stop_reason\":\"END\""),
        "{said}"
    );
    assert_eq!((choice.text.as_str(), choice.is_finished), ("the E", true));
}

#[test]
fn log_probabilities_of_what_has_no_text_come_and_those_of_what_is_said_again_do_not() {
    let splice = Splice::new(Endpoint::ChatCompletions, &Record::new(Endpoint::Completions, 1).said, 1, 1, false, 7);
    let (mut seam, mut choice) = (Seam::new("so ", 1, &[], false), of_text("so "));
    choice.has_role = true;
    let mut told = |text: &str| {
        let said = json!({ "index": 0, "delta": { "content": text }, "logprobs": { "content": [{ "token": text }] } });
        let frame = format!("data: {}\n\n", json!({ "choices": [said] }));
        String::from_utf8(splice.frames(frame.as_bytes(), 0, &mut choice, &mut seam, false).frames).unwrap()
    };
    assert_eq!(told(" "), "");
    assert!(told("").contains("\"delta\":{\"content\":\"\"}") && told("").contains("\"logprobs\":{\"content\":[{"));
    assert!(told("é").contains("é"));

    // Half a character that was told is made again.
    let mut cut = of_ids(&[("so", 5), ("", 6)]);
    cut.settle();
    let mut seam = Seam::new("so", 0, &[], false);
    let mut told = |text: &str| {
        let said = json!({ "index": 0, "delta": { "content": text }, "logprobs": { "content": [{ "token": text }] } });
        let frame = format!("data: {}\n\n", json!({ "choices": [said] }));
        splice.frames(frame.as_bytes(), 0, &mut cut, &mut seam, false).frames.is_empty()
    };
    assert_eq!([told(""), told("é"), told("")], [true, false, false]);
}

#[test]
fn what_is_kept_of_a_stream_is_bounded() {
    let mut record = Record::new(Endpoint::ChatCompletions, 150 << 10);
    let frame = format!("data: {}\n\n", json!({ "choices": [{ "index": 0, "text": "x".repeat(1000) }] }));
    for _ in 0..100 {
        record.keep(frame.as_bytes());
    }
    assert!(!record.is_over);
    for _ in 0..100 {
        record.keep(frame.as_bytes());
    }
    assert!(record.is_over && record.said.choices.is_empty());
}

#[test]
fn content_that_is_no_text_is_known_to_be_there_and_passes_a_seam_as_it_is() {
    let parts = json!([{ "type": "text", "text": "hi" }]);
    let frame = json!({ "choices": [{ "index": 0, "delta": { "content": parts } }] });
    let choice = whole(&format!("data: {frame}\n\n"));
    assert_eq!(choice.stage, Stage::Unknown);
    let original = original(Endpoint::ChatCompletions, &chat(json!({})));
    assert!(original.next(0, &choice, VLLM, None).is_err());

    let splice = Splice::new(Endpoint::ChatCompletions, &Record::new(Endpoint::Completions, 1).said, 1, 1, false, 7);
    let mut seam = Seam::new("", 0, &[], false);
    let spliced = splice.frames(format!("data: {frame}\n\n").as_bytes(), 0, &mut Choice::new(), &mut seam, false);
    let said = String::from_utf8(spliced.frames).unwrap();
    let said: Value = serde_json::from_str(said.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(said["choices"][0]["delta"], json!({ "role": "assistant", "content": parts }));
}

#[test]
fn an_event_that_cannot_be_read_is_not_taken_for_nothing() {
    let said = |frame: &str| recorded(&format!("data: {frame}\n\n"), &[100], frame.len() + 8).said;
    assert!(said(r#"{"choices":[{"index":"first","text":"a"}]}"#).has_unread);
    for nothing in ["[DONE]", "\"ping\"", "{\"choices\":null}", "no JSON", "{}"] {
        assert!(!said(nothing).has_unread, "{nothing}");
    }
}

#[test]
fn tokens_beyond_all_counting_are_not_counted_anew() {
    let splice = Splice::new(Endpoint::Completions, &Record::new(Endpoint::Completions, 1).said, 2, 2, false, 7);
    for choice in 0..2 {
        splice.tally.prompt(choice, u32::MAX);
        splice.tally.output(choice as u32, u32::MAX);
    }
    assert_eq!((splice.tally.prompt_tokens(), splice.tally.output_tokens()), (u32::MAX, u32::MAX));
    let end = String::from_utf8(splice.end(true).to_vec()).unwrap();
    assert!(end.contains(&(2 * u64::from(u32::MAX)).to_string()), "{end}");
}
