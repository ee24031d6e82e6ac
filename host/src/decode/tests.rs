//! What is decoded, what is refused, and what is taken out.

use dynamo_host_core::{TokenCount, request::flags};

use super::*;

const BOUNDS: Bounds = Bounds { max_output_tokens: 1_000_000, max_choices: 128 };

fn decode_text(endpoint: Endpoint, body: &str) -> Result<Decoded, RequestError> {
    decode(endpoint, "id".to_owned(), Bytes::copy_from_slice(body.as_bytes()), BOUNDS)
}

fn chat(rest: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}]{rest}}}"#)
}

#[track_caller]
fn check_error(endpoint: Endpoint, body: &str, says: &[&str]) {
    let error = decode_text(endpoint, body).expect_err("it should be refused").to_string();
    for part in says {
        assert!(error.contains(part), "{error:?} should say {part:?}");
    }
}

#[test]
fn a_body_without_host_fields_is_forwarded_as_it_is() {
    let body = Bytes::from(chat(r#", "new_parameter" : {"a":[1, 2]}, "seed":7"#));
    let decoded = decode(Endpoint::ChatCompletions, "id".to_owned(), body.clone(), BOUNDS).unwrap();
    assert_eq!(decoded.body.as_ptr(), body.as_ptr(), "not even copied");
    assert!(!decoded.stream);
    assert_eq!((decoded.facts.model.as_str(), decoded.facts.choices), ("m", 1));
}

#[test]
fn host_fields_are_taken_out_however_they_are_spelled_or_repeated() {
    let body = r#"{"kv_transfer_params":{"x":1},"model":"m","priorit\u0079":-5,"prompt":"p","priority":1,"a\"b":[ 1 ]}"#;
    let decoded = decode_text(Endpoint::Completions, body).unwrap();
    assert_eq!(decoded.body, r#"{"model":"m","prompt":"p","a\"b":[ 1 ]}"#);
}

#[test]
fn a_model_is_named_once_and_an_adapter_by_its_name_alone() {
    for twice in [r#","model":"secret""#, r#","MODEL":"secret""#, r#","Model":"m""#] {
        check_error(Endpoint::ChatCompletions, &chat(twice), &["`model`", "send it once"]);
    }
    let chosen = decode_text(Endpoint::ChatCompletions, &chat(r#","lora_path":"secret","lora":[{"id":1}],"rid":"x","x":1"#));
    assert_eq!(chosen.unwrap().body, chat(r#","x":1"#));
}

#[test]
fn a_name_is_replaced_wherever_it_stands_and_nothing_else_is() {
    let body = r#"{"model":"gpt","a":{"model": "x"},"n":1.50,"mod\u0065l": "gpt"}"#;
    let renamed = rename(&Bytes::from(body), "qwen \"3\"");
    assert_eq!(renamed, r#"{"model":"qwen \"3\"","a":{"model": "x"},"n":1.50,"model":"qwen \"3\""}"#);
}

#[test]
fn facts_are_read() {
    let body = chat(
        r#","stream":true,"max_tokens":5,"max_completion_tokens":7,"n":2,"tools":[{}],"response_format":{"type":"json_object"}"#,
    );
    let decoded = decode_text(Endpoint::ChatCompletions, &body).unwrap();
    assert!(decoded.stream);
    assert_eq!(decoded.facts.max_output_tokens, Some(7));
    assert_eq!(decoded.facts.choices, 2);
    assert_eq!(decoded.facts.flags, flags::STREAM | flags::TOOLS | flags::GUIDED);
    assert!(!decoded.facts.prompt.exact);
}

#[test]
fn token_ids_are_counted_and_text_is_estimated() {
    let tokens = |body: &str| decode_text(Endpoint::Completions, body).unwrap().facts.prompt;
    assert_eq!(tokens(r#"{"model":"m","prompt":[1,2,3]}"#), TokenCount { tokens: 3, exact: true });
    assert_eq!(tokens(r#"{"model":"m","prompt":"12345678"}"#), TokenCount { tokens: 2, exact: false });
    assert!(!tokens(r#"{"model":"m","prompt":["a","b"]}"#).exact);
    assert!(!tokens(r#"{"model":"m","prompt":[[1],[2]]}"#).exact);
}

#[test]
fn prompts_that_begin_alike_share_a_prefix_key() {
    let key = |tail: &str| {
        let body = format!(r#"{{"model":"m","prompt":"{}{tail}"}}"#, "x".repeat(2000));
        decode_text(Endpoint::Completions, &body).unwrap().facts.prefix_key
    };
    assert_eq!(key("a"), key("b"));
}

#[test]
fn images_are_items_and_not_text() {
    let image = "A".repeat(10_000);
    let body = format!(
        r#"{{"model":"m","messages":[{{"role":"system","content":"12345678"}},{{"role":"user","content":[
            {{"type":"text","text":"1234"}},{{"type":"image_url","image_url":{{"url":"data:{image}"}}}}]}}]}}"#
    );
    let facts = decode_text(Endpoint::ChatCompletions, &body).unwrap().facts;
    assert_eq!((facts.multimodal_items, facts.prompt), (1, TokenCount { tokens: 3, exact: false }));
}

#[test]
fn host_fields_go_by_prefix_and_within_vllms_arguments() {
    let forwarded = |body: &str| decode_text(Endpoint::Completions, body).map(|decoded| decoded.body);
    let body = r#"{"model":"m","prompt":"p","bootstrap_of_tomorrow":1,"x-dynamo-worker":"w","vllm_xargs":{"a":1,"kv_transfer_params":{}},"z":0}"#;
    assert_eq!(forwarded(body).unwrap(), r#"{"model":"m","prompt":"p","vllm_xargs":{"a":1},"z":0}"#);
    for passes in [r#"{"a": 1,"deeper":{"priority":1}}"#, "7", "[{}]"] {
        let body = format!(r#"{{"model":"m","prompt":"p","vllm_xargs":{passes}}}"#);
        assert_eq!(forwarded(&body).unwrap(), body);
    }
}

#[test]
fn only_a_response_format_of_another_type_than_text_constrains() {
    let is_guided = |format: &str| {
        let body = chat(&format!(r#","response_format":{format}"#));
        decode_text(Endpoint::ChatCompletions, &body).unwrap().facts.flags & flags::GUIDED != 0
    };
    assert!(is_guided(r#"{"type":"json_schema","json_schema":{"name":"text"}}"#));
    assert!(!is_guided(r#"{ "type" : "text" }"#));
    assert!(!is_guided("7"));
}

#[test]
fn a_batch_is_all_texts_or_all_token_ids() {
    let tokens = |prompt: &str| decode_text(Endpoint::Completions, &format!(r#"{{"model":"m","prompt":{prompt}}}"#));
    assert_eq!(tokens(r#"["1234","12345678"]"#).unwrap().facts.prompt.tokens, 3);
    assert_eq!(tokens("[[1, 2], [3]]").unwrap().facts.prompt.tokens, 3);
    for mixed in [r#"["a",[1]]"#, r#"[1,"a"]"#, "[[[1]]]", r#"[["a"]]"#, "[{}]", "[null]"] {
        tokens(mixed).unwrap_err();
    }
}

#[test]
fn choices_are_counted_over_all_prompts() {
    let choices = |prompt: &str, n: u32| {
        decode_text(Endpoint::Completions, &format!(r#"{{"model":"m","n":{n},"prompt":{prompt}}}"#)).unwrap().facts.choices
    };
    assert_eq!((choices(r#"["a","b","c"]"#, 2), choices("[1,2,3]", 2), choices(r#""a""#, 1)), (6, 2, 1));
}

#[test]
fn embeddings_are_of_texts_or_token_ids_and_never_streamed() {
    let facts = |input: &str| {
        let body = format!(r#"{{"model":"m","stream":true,"input":{input}}}"#);
        let decoded = decode_text(Endpoint::Embeddings, &body).unwrap();
        assert!(!decoded.stream);
        decoded.facts
    };
    assert_eq!(facts("[1,2,3]").prompt, TokenCount { tokens: 3, exact: true });
    assert_eq!(facts(r#"["1234","12345678"]"#).prompt.tokens, 3);
    assert_eq!((facts("[[1],[2,3]]").prompt.tokens, facts(r#"["a","b"]"#).choices), (3, 1));
    check_error(Endpoint::Embeddings, r#"{"model":"m"}"#, &["`input` is missing"]);
    check_error(Endpoint::Embeddings, r#"{"model":"m","input":7}"#, &["`input` is 7", "token ids"]);
}

#[test]
fn a_response_is_of_a_text_or_items_after_its_instructions() {
    let facts = |rest: &str| decode_text(Endpoint::Responses, &format!(r#"{{"model":"m",{rest}}}"#)).unwrap().facts;
    let text =
        facts(r#""input":"12345678","instructions":"1234","max_output_tokens":9,"text":{"format":{"type":"json_schema"}}"#);
    assert_eq!((text.prompt.tokens, text.max_output_tokens, text.flags), (3, Some(9), flags::GUIDED));
    let items = facts(
        r#""store":true,"background":false,"previous_response_id":null,"input":[{"role":"user","content":"1234"},
        {"role":"user","content":[{"type":"input_text","text":"1234"},{"type":"input_image","image_url":"data:xxxxxxxxxxxxx"}]},
        {"type":"function_call_output","call_id":"c","output":"1234"}]"#,
    );
    assert_eq!((items.prompt.tokens, items.multimodal_items), (3, 1));
    assert_ne!(facts(r#""input":"a","instructions":"b""#).prefix_key, facts(r#""input":"a""#).prefix_key);
    check_error(Endpoint::Responses, r#"{"model":"m","input":[]}"#, &["`input` is an empty array"]);
}

#[test]
fn what_only_one_engine_has_stored_is_refused() {
    for (field, value) in [("previous_response_id", "\"resp_1\""), ("background", "true"), ("conversation", "{\"id\":\"c\"}")] {
        let body = format!(r#"{{"model":"m","input":"x","{field}":{value}}}"#);
        check_error(Endpoint::Responses, &body, &[field, "one engine has stored"]);
    }
    let body = r#"{"model":"m","input":[{"type":"item_reference","id":"msg_1"}]}"#;
    check_error(Endpoint::Responses, body, &["`input`", "item_reference"]);
}

#[test]
fn a_message_has_a_system_and_blocks() {
    let body = r#"{"model":"m","max_tokens":5,"stream":true,"system":[{"type":"text","text":"12345678"}],"tools":[{}],"messages":[
        {"role":"user","content":[{"type":"text","text":"1234"},{"type":"image","source":{"data":"AAAAAAAAAAAAAAAAAAAAAA"}}]},
        {"role":"user","content":[{"type":"tool_result","tool_use_id":"t","content":[{"type":"text","text":"1234"}]}]}]}"#;
    let decoded = decode_text(Endpoint::Messages, body).unwrap();
    let facts = decoded.facts;
    assert_eq!((facts.prompt.tokens, facts.multimodal_items, facts.max_output_tokens), (4, 1, Some(5)));
    assert!(decoded.stream && facts.flags == flags::STREAM | flags::TOOLS);
    assert!(!decode_text(Endpoint::CountTokens, body).unwrap().stream);
    let deep = format!("{}1{}", r#"[{"content":"#.repeat(50_000), "}]".repeat(50_000));
    let _ = decode_text(Endpoint::Messages, &format!(r#"{{"model":"m","messages":[{{"role":"user","content":{deep}}}]}}"#));
}

#[test]
fn there_is_a_bound_on_names_and_on_their_number() {
    let many: String = (0..600).map(|i| format!(r#","f{i}":{i}"#)).collect();
    check_error(Endpoint::ChatCompletions, &chat(&many), &["more than 512 fields", "send fewer"]);
    check_error(Endpoint::ChatCompletions, &chat(&format!(r#","vllm_xargs":{{"a":1{many}}}"#)), &["`vllm_xargs` is an object"]);
    let long = format!(r#"{{"model":"{}","prompt":"p"}}"#, "m".repeat(257));
    check_error(Endpoint::Completions, &long, &["`model` is 257 bytes long", "at most 256"]);
}

#[test]
fn a_null_is_an_absent_field() {
    let decoded = decode_text(Endpoint::ChatCompletions, &chat(r#","stream":null,"max_tokens":null,"n":null"#)).unwrap();
    assert!(!decoded.stream);
    assert_eq!(decoded.facts.max_output_tokens, None);
}

#[test]
fn each_wrong_field_is_named_with_what_is_accepted() {
    let chat_error = |rest: &str, says: &[&str]| check_error(Endpoint::ChatCompletions, &chat(rest), says);
    chat_error(r#","stream":"yes""#, &["`stream` is a string", "use true or false"]);
    chat_error(r#","max_tokens":-1"#, &["`max_tokens` is -1", "from 0 to 1000000"]);
    chat_error(r#","max_tokens":1e30"#, &["`max_tokens` is 1e30"]);
    chat_error(r#","max_tokens":99999999999999999999999"#, &["`max_tokens` is 99999"]);
    chat_error(r#","max_tokens":1000001"#, &["`max_tokens` is 1000001"]);
    chat_error(r#","n":1.5"#, &["`n` is 1.5"]);
    chat_error(r#","n":0"#, &["`n` is 0", "from 1"]);
    check_error(Endpoint::ChatCompletions, r#"{"messages":[]}"#, &["`model` is missing"]);
    check_error(Endpoint::ChatCompletions, r#"{"model":7,"messages":[]}"#, &["`model` is 7"]);
    check_error(Endpoint::ChatCompletions, r#"{"model":"m"}"#, &["`messages` is missing"]);
    check_error(Endpoint::ChatCompletions, r#"{"model":"m","messages":[]}"#, &["`messages` is an empty array"]);
    check_error(Endpoint::ChatCompletions, r#"{"model":"m","messages":"hi"}"#, &["`messages` is a string"]);
    check_error(Endpoint::ChatCompletions, r#"{"model":"m","messages":[1]}"#, &["`messages` is an array"]);
    check_error(Endpoint::Completions, r#"{"model":"m"}"#, &["`prompt` is missing"]);
    check_error(Endpoint::Completions, r#"{"model":"m","prompt":{}}"#, &["`prompt` is an object"]);
    check_error(Endpoint::Completions, r#"{"model":"m","prompt":[-1]}"#, &["`prompt` is an array"]);
}

#[test]
fn what_is_not_a_json_object_says_so() {
    check_error(Endpoint::Completions, "", &["it is empty"]);
    check_error(Endpoint::Completions, "{\"model\":", &["cut off"]);
    check_error(Endpoint::Completions, "[]", &["JSON object"]);
    let error = decode_text(Endpoint::Completions, "\"a secret\"").unwrap_err().to_string();
    assert!(error.contains("it is a string") && !error.contains("secret"), "{error}");
    check_error(Endpoint::Completions, "{'model':1}", &["line 1 column 2"]);
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let _ = decode_text(Endpoint::Completions, &format!(r#"{{"model":"m","prompt":{deep}}}"#)).unwrap_err();
    let error = decode(Endpoint::Completions, String::new(), Bytes::from_static(b"{\"a\":\"\xff\"}"), BOUNDS).unwrap_err();
    assert!(error.to_string().contains("byte 6"), "{error}");
}
