//! What each protocol's legs say, and what is read of an answer.

use dynamo_engine_api::Endpoint::{ChatCompletions, Completions};
use serde_json::{Value, json};

use super::*;

const COMPLETION: &str = include_str!("../../tests/fixtures/vllm_prefill_completion.json");
const CHAT: &str = include_str!("../../tests/fixtures/vllm_prefill_chat.json");

fn engine_with(options: OpenAiOptions) -> Handoff {
    Handoff::new("http://p:8000".into(), &EngineUrl::parse("http://p:8000").unwrap(), &options).unwrap()
}

fn engine() -> Handoff {
    engine_with(OpenAiOptions::default())
}

fn body_of(protocol: Protocol, leg: &Leg, endpoint: Endpoint, body: &str) -> String {
    let mut fields = Fields::default();
    engine().leg(Some(protocol), leg, endpoint, &mut fields).unwrap();
    String::from_utf8(fields.into_body(body.to_owned().into()).to_vec()).unwrap()
}

fn whole(body: impl Into<bytes::Bytes>) -> WholeReply {
    WholeReply { status: http::StatusCode::OK, headers: http::HeaderMap::new(), body: body.into() }
}

#[track_caller]
fn ready(protocol: Protocol, body: &str) -> Ticket {
    match engine().prefilled(Some(protocol), &whole(body.to_owned())) {
        Ok(Prefilled::Ready(ticket)) => ticket,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(protocol: Protocol, body: &str, says: &str) {
    let error = engine().prefilled(Some(protocol), &whole(body.to_owned())).unwrap_err().to_string();
    assert!(error.contains(says) && error.contains("http://p:8000"), "{error}");
    assert!(error.len() < 600, "{} bytes of an error", error.len());
}

#[test]
fn a_protocol_follows_from_the_kind_unless_it_is_told() {
    let by_kind = |kind, is_mock| engine().protocol(kind, is_mock);
    assert_eq!(by_kind(Kind::Vllm, false), Some(Protocol::Nixl));
    assert_eq!(by_kind(Kind::Sglang, false), Some(Protocol::Bootstrap));
    assert_eq!(by_kind(Kind::Trtllm, false), Some(Protocol::Context));
    assert_eq!(by_kind(Kind::Openai, true), Some(Protocol::Nixl));
    assert_eq!((by_kind(Kind::Openai, false), by_kind(Kind::Llamacpp, false)), (None, None));
    let told = engine_with(OpenAiOptions { handoff: Some(Protocol::Mooncake), ..Default::default() });
    assert_eq!(told.protocol(Kind::Openai, false), Some(Protocol::Mooncake));
}

#[test]
fn nixl_prefills_one_token_and_nothing_that_could_stop_it_is_said() {
    let body = r#"{"model":"m","prompt":"p","stream":true,"stream_options":{"include_usage":true},"max_tokens":50,"min_tokens":7,"stop":["a"],"temperature":0.5}"#;
    let sent = body_of(Protocol::Nixl, &Leg::Prefill(None), Completions, body);
    let params = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;
    let expected = format!(
        r#"{{"stream":false,"max_tokens":1,"ignore_eos":true,"kv_transfer_params":{params},"return_token_ids":true,"model":"m","prompt":"p","temperature":0.5}}"#
    );
    assert_eq!(sent, expected);
    let chat: Value = serde_json::from_str(&body_of(
        Protocol::Nixl,
        &Leg::Prefill(None),
        ChatCompletions,
        r#"{"messages":[],"max_completion_tokens":9,"return_token_ids":true}"#,
    ))
    .unwrap();
    assert_eq!(
        (&chat["max_completion_tokens"], &chat["max_tokens"], &chat["return_token_ids"]),
        (&json!(1), &json!(1), &Value::Null),
        "chats do not go on by ids"
    );
}

#[test]
fn what_a_real_vllm_says_of_its_kv_goes_on_byte_for_byte() {
    // It was captured without `return_token_ids`; these are the ids that were sent.
    let completion =
        COMPLETION.replace("\"prompt_token_ids\":null", &format!("\"prompt_token_ids\":{:?}", (3000..3100).collect::<Vec<_>>()));
    for (answer, endpoint, prompt_ids) in [(completion.as_str(), Completions, 100), (CHAT, ChatCompletions, 0)] {
        let ticket = ready(Protocol::Nixl, answer);
        let at = answer.find("\"kv_transfer_params\":").unwrap() + "\"kv_transfer_params\":".len();
        assert!(answer[at..].starts_with(ticket.state.get()), "{}", ticket.state);
        assert_eq!(ticket.prompt_ids.as_ref().map_or(0, |ids| ids.len()), prompt_ids);
        assert_eq!(ticket.cached_tokens, Some(0));
        let state = ticket.state.clone();
        let sent = body_of(Protocol::Nixl, &Leg::Decode(ticket), endpoint, r#"{"prompt":"text","messages":[1],"stream":true}"#);
        assert!(sent.starts_with(&format!("{{\"kv_transfer_params\":{state}")), "{sent}");
        let sent: Value = serde_json::from_str(&sent).unwrap();
        assert_eq!(sent["prompt"].as_array().map_or(0, Vec::len), prompt_ids);
        assert_eq!((&sent["messages"], &sent["stream"]), (&json!([1]), &json!(true)));
    }
}

#[test]
fn an_answer_without_transfer_parameters_says_how_to_start_the_engine() {
    for body in [r#"{"choices":[]}"#, r#"{"kv_transfer_params":null}"#, "{}"] {
        refused(Protocol::Nixl, body, "--kv-transfer-config");
    }
    refused(Protocol::Context, r#"{"choices":[{"finish_reason":"length"}]}"#, "cache_transceiver_config");
}

#[test]
fn hostile_answers_are_refused_and_not_repeated() {
    for body in ["", "null", "[]", "\"x\"", "{", r#"{"choices":5}"#, r#"{"kv_transfer_params":{},"kv_transfer_params":{}}"#] {
        refused(Protocol::Nixl, body, "its answer to a prefill");
    }
    refused(Protocol::Nixl, r#"{"kv_transfer_params":"secret"}"#, "an object is expected");
    refused(Protocol::Nixl, r#"{"kv_transfer_params":{},"prompt_token_ids":["secret"]}"#, "prompt_token_ids");
    refused(Protocol::Nixl, r#"{"kv_transfer_params":{},"prompt_token_ids":[-1]}"#, "prompt_token_ids");
    refused(Protocol::Nixl, r#"{"kv_transfer_params":{},"prompt_token_ids":[4294967296]}"#, "prompt_token_ids");
    let huge = format!(r#"{{"kv_transfer_params":{{"remote_block_ids":[[{}0]]}}}}"#, "1,".repeat(3 << 20));
    refused(Protocol::Nixl, &huge, "at most 4194304");
    let deep = format!(r#"{{"kv_transfer_params":{}}}"#, "[".repeat(1 << 20));
    refused(Protocol::Nixl, &deep, "its answer to a prefill");
    for body in
        [r#"{"choices":[]}"#, r#"{"choices":[5]}"#, r#"{"choices":[{"finish_reason":"length","disaggregated_params":7}]}"#]
    {
        refused(Protocol::Context, body, "its answer to a prefill");
    }
    let ticket = ready(Protocol::Nixl, r#"{"kv_transfer_params":{"remote_prefill_cached_tokens":"many"}}"#);
    assert_eq!((ticket.cached_tokens, ticket.prompt_ids), (None, None), "what is for our books alone does not fail a request");
}

#[test]
fn sglang_gets_the_same_body_twice_and_never_the_same_room() {
    let options = OpenAiOptions { bootstrap_host: Some("p.rack".into()), bootstrap_port: 9001, ..Default::default() };
    let make = |rank| engine_with(options.clone()).bootstrap.ticket(rank);
    let (ticket, other) = (make(None), make(None));
    assert_ne!(ticket.state.get(), other.state.get());
    let body = r#"{"messages":[],"stream":true,"max_tokens":5,"bootstrap_room":1}"#;
    let prefill = body_of(Protocol::Bootstrap, &Leg::Prefill(Some(ticket.clone())), ChatCompletions, body);
    let decode = body_of(Protocol::Bootstrap, &Leg::Decode(ticket.clone()), ChatCompletions, body);
    assert_eq!(prefill, decode);
    let state = ticket.state.get().trim_end_matches('}');
    assert_eq!(prefill, format!(r#"{state},"messages":[],"stream":true,"max_tokens":5}}"#));
    assert!(state.starts_with(r#"{"bootstrap_host":"p.rack","bootstrap_port":9001,"bootstrap_room":"#), "{state}");
    assert!(make(Some(3)).state.get().ends_with(r#","disagg_prefill_dp_rank":3}"#));
    assert_eq!(engine().bootstrap.ticket(None).state.get().split(',').next(), Some(r#"{"bootstrap_host":"p""#));
}

#[test]
fn a_context_says_nothing_but_that_it_is_one() {
    let body = r#"{"model":"m","messages":[],"stream":true,"stream_options":{"include_usage":true},"max_tokens":50}"#;
    let sent = body_of(Protocol::Context, &Leg::Prefill(None), ChatCompletions, body);
    assert_eq!(
        sent,
        r#"{"stream":false,"disaggregated_params":{"request_type":"context_only"},"model":"m","messages":[],"max_tokens":50}"#
    );
}

#[test]
fn a_generation_has_the_contexts_state_and_its_tokens() {
    let answer = r#"{"prompt_token_ids":[1,2,3],"choices":[{"finish_reason":"length","disaggregated_params":{"request_type": "context_only", "first_gen_tokens":[9] ,"encoded_opaque_state":"q80\/\u0041==","ctx_request_id":18446744073709551615}}]}"#;
    let ticket = ready(Protocol::Context, answer);
    let params = r#""disaggregated_params":{"request_type":"generation_only","first_gen_tokens":[9] ,"encoded_opaque_state":"q80\/\u0041==","ctx_request_id":18446744073709551615}"#;
    let completion = body_of(Protocol::Context, &Leg::Decode(ticket.clone()), Completions, r#"{"prompt":"p","stream":true}"#);
    assert_eq!(completion, format!(r#"{{{params},"prompt":[1,2,3],"stream":true}}"#));
    let chat = body_of(Protocol::Context, &Leg::Decode(ticket), ChatCompletions, r#"{"messages":["m"]}"#);
    assert_eq!(chat, format!(r#"{{{params},"prompt_token_ids":[1,2,3],"messages":["m"]}}"#));
}

#[test]
fn a_context_that_finished_is_the_whole_answer() {
    for (reason, is_final) in [("\"stop\"", true), ("\"length\"", false), ("\"not_finished\"", false), ("null", false)] {
        let body = format!(r#"{{"choices":[{{"finish_reason":{reason},"disaggregated_params":{{}}}}]}}"#);
        let prefilled = engine().prefilled(Some(Protocol::Context), &whole(body)).unwrap();
        assert_eq!(matches!(prefilled, Prefilled::Final), is_final, "{reason}");
    }
}

#[test]
fn what_has_no_sense_is_refused_before_anything_is_sent() {
    let ticket = engine().bootstrap.ticket(None);
    let refused = |protocol, leg: &Leg, endpoint, says: &str| {
        let error = engine().leg(protocol, leg, endpoint, &mut Fields::default()).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    refused(None, &Leg::Prefill(None), Completions, "handoff = \"nixl\"");
    refused(Some(Protocol::Nixl), &Leg::Prefill(None), Endpoint::Messages, "are not handed over");
    refused(Some(Protocol::Nixl), &Leg::Decode(ticket.clone()), Completions, "the ticket is of bootstrap");
    refused(Some(Protocol::Bootstrap), &Leg::Prefill(None), Completions, "needs a ticket");
    assert!(engine().leg(None, &Leg::Whole, Endpoint::Embeddings, &mut Fields::default()).unwrap());
}
