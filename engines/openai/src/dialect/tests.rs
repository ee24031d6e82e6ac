//! Which server it is, and what each is told.

use super::*;

#[track_caller]
fn additions(kind: Kind, wish: (Endpoint, Option<u32>, i32)) -> Additions {
    let (endpoint, rank, priority) = wish;
    let mut request = GenerateRequest::new(endpoint, bytes::Bytes::new(), true, "r".into());
    (request.rank, request.priority) = (rank, priority);
    let id = || "0123".to_owned();
    Dialects::new(Some(kind)).spoken().additions(&Wish::of(&request, true, &id))
}

fn fields(additions: Additions) -> String {
    let body = additions.fields.into_body(bytes::Bytes::from_static(b"{}"));
    String::from_utf8(body.to_vec()).unwrap()
}

#[test]
fn servers_are_recognised_by_the_name_they_give_themselves() {
    for (name, kind) in [
        ("vllm", Kind::Vllm),
        ("sglang", Kind::Sglang),
        ("tensorrt_llm", Kind::Trtllm),
        ("llamacpp", Kind::Llamacpp),
        ("me", Kind::Openai),
        ("", Kind::Openai),
    ] {
        assert_eq!(recognise(name), kind, "{name}");
    }
}

#[test]
fn what_is_told_is_never_found_out() {
    let dialects = Dialects::new(Some(Kind::Sglang));
    assert!(!dialects.is_unsure());
    dialects.found(Kind::Vllm);
    dialects.failed(&EngineError::Connect { engine: "e".into(), reason: "r".into() });
    assert_eq!((dialects.kind(), dialects.is_unsure()), (Kind::Sglang, false));
}

#[test]
fn what_was_found_stays_until_the_server_was_not_there() {
    let dialects = Dialects::new(None);
    assert_eq!((dialects.kind(), dialects.is_unsure()), (Kind::Openai, true));
    dialects.found(Kind::Llamacpp);
    dialects.failed(&EngineError::Unhealthy { engine: "e".into(), reason: "r".into() });
    assert_eq!((dialects.kind(), dialects.is_unsure()), (Kind::Llamacpp, false));
    dialects.failed(&EngineError::Connect { engine: "e".into(), reason: "r".into() });
    assert_eq!((dialects.kind(), dialects.is_unsure()), (Kind::Llamacpp, true));
    dialects.found(Kind::Vllm);
    assert_eq!((dialects.kind(), dialects.is_unsure()), (Kind::Vllm, false));
}

#[test]
fn priorities_are_written_in_each_engines_sense() {
    let sooner = (Endpoint::ChatCompletions, None, 7);
    assert_eq!(fields(additions(Kind::Vllm, sooner)), r#"{"priority":-7}"#);
    assert_eq!(fields(additions(Kind::Vllm, (Endpoint::Completions, None, i32::MIN))), r#"{"priority":2147483648}"#);
    assert_eq!(fields(additions(Kind::Sglang, sooner)), r#"{"rid":"0123","priority":7}"#);
    for kind in [Kind::Trtllm, Kind::Llamacpp, Kind::Openai] {
        assert_eq!(additions(kind, sooner), Additions::default(), "{kind}");
    }
    assert_eq!(additions(Kind::Vllm, (Endpoint::ChatCompletions, None, 0)), Additions::default());
    assert_eq!(additions(Kind::Vllm, (Endpoint::Messages, None, 7)), Additions::default());
}

#[test]
fn priorities_stay_here_unless_they_shall_be_said() {
    let mut request = GenerateRequest::new(Endpoint::ChatCompletions, bytes::Bytes::new(), true, "r".into());
    request.priority = 7;
    assert_eq!(Wish::of(&request, false, &String::new).priority, None);
}

#[test]
fn ranks_are_chosen_by_a_header_or_a_field() {
    let third = (Endpoint::Completions, Some(3), 0);
    let header = additions(Kind::Vllm, third);
    assert_eq!(
        header.header.as_ref().map(|(name, value)| (name.as_str(), value.to_str().unwrap())),
        Some(("x-data-parallel-rank", "3"))
    );
    assert_eq!(fields(header), "{}");
    assert_eq!(fields(additions(Kind::Sglang, third)), r#"{"rid":"0123","routed_dp_rank":3}"#);
    for kind in [Kind::Trtllm, Kind::Llamacpp, Kind::Openai] {
        assert_eq!(additions(kind, third), Additions::default(), "{kind}");
    }
}

#[test]
fn sglang_is_told_to_abort_by_the_id_that_it_was_given() {
    let abort = additions(Kind::Sglang, (Endpoint::ChatCompletions, None, 0)).abort.unwrap();
    assert_eq!((abort.path, abort.body.as_str()), ("/abort_request", r#"{"rid":"0123","abort_all":false}"#));
    for endpoint in [Endpoint::Messages, Endpoint::Responses, Endpoint::Embeddings, Endpoint::CountTokens] {
        assert_eq!(additions(Kind::Sglang, (endpoint, Some(1), 1)), Additions::default(), "{endpoint:?}");
    }
}
