//! Requests against what a vLLM 0.32 server said to the same ones.

use super::*;
use crate::model::Profile;

fn options() -> MockOptions {
    let profile = Profile { max_model_len: 4096, ..Profile::default() };
    MockOptions { model: "tiny-qwen3".to_owned(), chat_tokens: 8, profile, ..MockOptions::default() }
}

fn chat(body: &str) -> Result<Order, ApiError> {
    decode(Endpoint::ChatCompletions, body.as_bytes(), &options())
}

fn completion(body: &str) -> Result<Order, ApiError> {
    decode(Endpoint::Completions, body.as_bytes(), &options())
}

#[track_caller]
fn check_error(result: Result<Order, ApiError>, status: u16, body: &str) {
    let error = result.unwrap_err();
    assert_eq!((error.status.as_u16(), String::from_utf8(error.body()).unwrap().as_str()), (status, body));
}

#[test]
fn errors_are_vllms_to_the_letter() {
    check_error(
        chat(r#"{"model":"nope","messages":[{"role":"user","content":"hi"}]}"#),
        404,
        r#"{"error":{"message":"The model `nope` does not exist. Valid aliases: tiny-qwen3.","type":"NotFoundError","param":"model","code":404}}"#,
    );
    check_error(
        chat("{nonsense"),
        400,
        r#"{"error":{"message":"1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.1', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', 'ctx': {'error': 'Expecting property name enclosed in double quotes'}}","type":"Bad Request","param":"body.1","code":400}}"#,
    );
    check_error(
        chat(r#"{"messages":"hi","temperature":"x"}"#),
        400,
        r#"{"error":{"message":"2 validation errors:\n  {'type': 'list_type', 'loc': 'body.messages', 'msg': 'Input should be a valid list', 'input': 'hi'}\n  {'type': 'float_parsing', 'loc': 'body.temperature', 'msg': 'Input should be a valid number, unable to parse string as a number', 'input': 'x'}","type":"Bad Request","param":"body.messages","code":400}}"#,
    );
    check_error(
        completion(r#"{"prompt":"hi","temperature":-1.0}"#),
        400,
        r#"{"error":{"message":"temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)","type":"BadRequestError","param":"temperature","code":400}}"#,
    );
    check_error(
        completion(r#"{"prompt":"hi","temperature":0,"n":2}"#),
        400,
        r#"{"error":{"message":"n must be 1 when using greedy sampling, got 2.","type":"BadRequestError","param":null,"code":400}}"#,
    );
    check_error(
        completion(r#"{"prompt":"hi","max_tokens":9999}"#),
        400,
        r#"{"error":{"message":"max_tokens=9999 cannot be greater than max_model_len=4096. Please request fewer output tokens. (parameter=max_tokens, value=9999)","type":"BadRequestError","param":"max_tokens","code":400}}"#,
    );
    let long = serde_json::json!({"prompt": vec![1; 5000]}).to_string();
    check_error(
        completion(&long),
        400,
        r#"{"error":{"message":"This model's maximum context length is 4096 tokens. However, your prompt contains 5000 input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. (parameter=input_tokens, value=5000)","type":"BadRequestError","param":"input_tokens","code":400}}"#,
    );
}

#[track_caller]
fn check_message(result: Result<Order, ApiError>, expected: &str) {
    let error = result.unwrap_err();
    let body = String::from_utf8(error.body()).unwrap();
    assert!(error.status.as_u16() == 400 && body.contains(expected), "{body}");
}

#[test]
fn other_impossible_requests_are_refused_too() {
    check_message(chat("[]"), "'loc': 'body', 'msg': 'Input should be a valid dictionary'");
    check_message(chat("{}"), "'type': 'missing', 'loc': 'body.messages'");
    check_message(chat(r#"{"messages":[{"content":"x"}]}"#), "body.messages.0.role");
    check_message(chat(r#"{"messages":[{"role":"user","content":5}]}"#), "body.messages.0.content");
    check_message(completion("{}"), "Either prompt or prompt_embeds must be provided and non-empty.");
    check_message(completion(r#"{"prompt":""}"#), "Either prompt or prompt_embeds must be provided and non-empty.");
    check_message(completion(r#"{"prompt":["",""]}"#), "The decoder prompt cannot be empty");
    check_message(completion(r#"{"prompt":{"a":1}}"#), "'loc': 'body.prompt'");
    check_message(completion(r#"{"prompt":[1,"x"]}"#), "'loc': 'body.prompt'");
    check_message(completion(r#"{"prompt":[-1]}"#), "'loc': 'body.prompt'");
    check_message(completion(r#"{"prompt":"x","max_tokens":0}"#), "max_tokens must be at least 1, got 0.");
    check_message(completion(r#"{"prompt":"x","max_tokens":1.5}"#), "got a number with a fractional part");
    check_message(completion(r#"{"prompt":"x","max_tokens":"many"}"#), "unable to parse string as an integer");
    check_message(completion(r#"{"prompt":"x","stream":"yes"}"#), "'bool_type', 'loc': 'body.stream'");
    check_message(completion(r#"{"prompt":"x","stop":[1]}"#), "'loc': 'body.stop'");
    check_message(completion(r#"{"prompt":"x","n":0}"#), "n must be at least 1, got 0.");
    check_message(completion(r#"{"prompt":"x","n":100000}"#), "must be at most 1024");
    check_message(
        completion(r#"{"prompt":[1,2,3],"max_tokens":4096}"#),
        "you requested 4096 output tokens and your prompt contains at least 3 input tokens, for a total of at least 4099 tokens",
    );
    check_message(completion(&serde_json::json!({"prompt": vec![1; 4096]}).to_string()), "for a total of at least 4097 tokens");
}

#[track_caller]
fn check_output(order: Result<Order, ApiError>, expected: &[(u32, FinishReason)]) {
    let outputs: Vec<_> = order.unwrap().sequences().iter().map(|sequence| (sequence.output_tokens, sequence.finish)).collect();
    assert_eq!(outputs, expected);
}

#[test]
fn the_output_is_as_long_as_was_asked_for() {
    use FinishReason::{Length, Stop};
    let message = r#""messages":[{"role":"user","content":"hi"}]"#;
    check_output(chat(&format!("{{{message}}}")), &[(8, Stop)]);
    check_output(chat(&format!("{{{message},\"max_tokens\":5}}")), &[(5, Length)]);
    check_output(chat(&format!("{{{message},\"max_tokens\":5,\"max_completion_tokens\":6}}")), &[(6, Length)]);
    check_output(completion(r#"{"prompt":"hi"}"#), &[(16, Length)]);
    check_output(completion(r#"{"prompt":"hi","max_tokens":null,"n":2}"#), &[(16, Length); 2]);
    check_output(completion(&serde_json::json!({"prompt": vec![1; 4090]}).to_string()), &[(6, Length)]);
    check_output(completion(r#"{"prompt":["a","b"],"n":2,"max_tokens":3}"#), &[(3, Length); 4]);
}

#[test]
fn prompts_of_token_ids_are_taken_as_they_are() {
    let prompts = |body| completion(body).unwrap().choices.iter().map(|choice| choice.prompt.to_vec()).collect::<Vec<_>>();
    assert_eq!(prompts(r#"{"prompt":[7,8,9]}"#), [[7, 8, 9]]);
    assert_eq!(prompts(r#"{"prompt":[[7],[8]]}"#), [[7], [8]]);
    assert_eq!(prompts(r#"{"prompt":"t0 t1"}"#), [[tokens::VOCABULARY, tokens::VOCABULARY + 1]]);
}

#[test]
fn the_next_turn_of_a_chat_begins_with_this_turn() {
    let first = chat(r#"{"messages":[{"role":"user","content":"tell me more"}]}"#).unwrap();
    let second = chat(
        r#"{"messages":[{"role":"user","content":"tell me more"},{"role":"assistant","content":"t0 t1"},{"role":"user","content":"and more"}]}"#,
    )
    .unwrap();
    let known = [&*first.choices[0].prompt, &[tokens::VOCABULARY, tokens::VOCABULARY + 1]].concat();
    assert_eq!(second.choices[0].prompt[..known.len()], known);
    let parts = chat(r#"{"messages":[{"role":"user","content":[{"type":"text","text":"tell me more"}]}]}"#).unwrap();
    assert_eq!(parts.choices[0].prompt, first.choices[0].prompt);
}

#[test]
fn a_stop_string_ends_the_output_before_it() {
    let stopped = |stop: &str| {
        let order = completion(&format!(r#"{{"prompt":"x","max_tokens":50,"stop":{stop}}}"#)).unwrap();
        let choice = &order.choices[0];
        (choice.output_tokens, choice.finish, choice.shown_bytes, choice.stop_reason.clone())
    };
    // t0 t1 t2 t3 t4
    assert_eq!(stopped(r#""t3""#), (4, FinishReason::Stop, 9, Some("t3".to_owned())));
    assert_eq!(stopped(r#"["nope"," t3 t4","t4"]"#), (5, FinishReason::Stop, 8, Some(" t3 t4".to_owned())));
    assert_eq!(stopped(r#""t49""#).0, 50);
    assert_eq!(stopped(r#"["t50",""]"#), (50, FinishReason::Length, usize::MAX, None));
}

#[test]
fn tokenizing_answers_with_ids_or_the_same_errors() {
    let ids = |body: &str| decode_tokenize(body.as_bytes(), &options());
    assert_eq!(ids(r#"{"prompt":"t5"}"#), Ok(vec![tokens::VOCABULARY + 5]));
    let message = r#"{"messages":[{"role":"user","content":"hi"}]}"#;
    assert_eq!(ids(message).unwrap(), chat(message).unwrap().choices[0].prompt.to_vec());
    assert_eq!(ids(r#"{"model":"nope","prompt":"x"}"#).unwrap_err().status.as_u16(), 404);
    assert_eq!(ids("{}").unwrap_err().status.as_u16(), 400);
}
