use proptest::prelude::*;

use super::*;

const VLLM_CHAT: &str = include_str!("../../tests/fixtures/vllm_chat.sse");
const VLLM_TOKEN_IDS: &str = include_str!("../../tests/fixtures/vllm_completions_token_ids.sse");
const VLLM_TOOL_CALL: &str = include_str!("../../tests/fixtures/vllm_tool_call.sse");
const VLLM_KILLED_CORE: &str = include_str!("../../tests/fixtures/vllm_killed_core.sse");
const VLLM_DEAD_CORE: &str = include_str!("../../tests/fixtures/vllm_dead_core_at_once.sse");
const VLLM_SIGTERM: &str = include_str!("../../tests/fixtures/vllm_sigterm.sse");
const LLAMA_CHAT: &str = include_str!("../../tests/fixtures/llama_chat.sse");
const LLAMA_SIGTERM: &str = include_str!("../../tests/fixtures/llama_sigterm.sse");
const TRANSFORMERS_CHAT: &str = include_str!("../../tests/fixtures/transformers_chat.sse");
const DONE: &str = "data: [DONE]\n\n";
const TOKEN: &str = "data: {\"choices\":[{\"index\":0,\"text\":\"é\",\"finish_reason\":null}]}\n\n";
const FINISH: &str = "data: {\"choices\":[{\"index\":0,\"text\":\"\",\"finish_reason\":\"stop\"}]}\n\n";
const ERROR: &str = "data: {\"error\": {\"message\": \"core died\", \"code\": 500}}\n\n";

/// What a client got: bytes, tokens, and how it ended (`done`, or an error's label).
#[derive(Debug, PartialEq)]
struct Got {
    text: String,
    tokens: u32,
    end: &'static str,
}

fn collect(relay: &mut Relay) -> Got {
    let mut got = Got { text: String::new(), tokens: 0, end: "nothing" };
    while let Some(item) = relay.next() {
        assert_eq!(got.end, "nothing", "an item after the one that ends the stream");
        match item {
            Ok(chunk) => {
                got.text.push_str(std::str::from_utf8(&chunk.bytes).expect("whole frames are whole characters"));
                got.tokens += chunk.summary.tokens;
                if chunk.summary.done {
                    got.end = "done";
                }
            }
            Err(error) => got.end = error.label(),
        }
    }
    assert!(relay.is_over());
    got
}

fn relayed<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Got {
    let mut relay = Relay::new("http://engine".into(), Endpoint::ChatCompletions);
    for piece in pieces {
        relay.read(Bytes::copy_from_slice(piece));
    }
    relay.end();
    collect(&mut relay)
}

/// The same stream in one read and byte by byte, which cuts every character and every frame.
#[track_caller]
fn check(stream: &str, text: &str, tokens: u32, end: &'static str) {
    let expected = Got { text: text.to_owned(), tokens, end };
    assert_eq!(relayed([stream.as_bytes()]), expected);
    assert_eq!(relayed(stream.as_bytes().chunks(1)), expected);
}

#[test]
fn a_good_stream_passes_as_it_is() {
    check(VLLM_CHAT, VLLM_CHAT, 5, "done");
    check(VLLM_TOKEN_IDS, VLLM_TOKEN_IDS, 3, "done");
    check(VLLM_TOOL_CALL, VLLM_TOOL_CALL, 11, "done");
    check(LLAMA_CHAT, LLAMA_CHAT, 5, "done");
}

#[test]
fn a_finished_stream_without_done_gets_one() {
    check(TRANSFORMERS_CHAT, &[TRANSFORMERS_CHAT, DONE].concat(), 5, "done");
}

#[test]
fn a_last_frame_without_its_blank_line_passes_with_one() {
    check(&[TOKEN, FINISH.trim_end()].concat(), &[TOKEN, FINISH, DONE].concat(), 1, "done");
    check(&[TOKEN, FINISH, "data: [DONE]"].concat(), &[TOKEN, FINISH, DONE].concat(), 1, "done");
}

#[test]
fn a_stream_cut_between_tokens_is_incomplete_and_what_came_passes() {
    let whole_frames = |stream: &str| stream[..stream.rfind("\n\n").unwrap() + 2].to_owned();
    check(VLLM_SIGTERM, &whole_frames(VLLM_SIGTERM), 6, "engine_incomplete");
    check(LLAMA_SIGTERM, &whole_frames(LLAMA_SIGTERM), 6, "engine_incomplete");
    check("", "", 0, "engine_incomplete");
}

#[test]
fn a_frame_cut_in_its_middle_does_not_pass() {
    check(&[TOKEN, &TOKEN[..30]].concat(), TOKEN, 1, "engine_incomplete");
    check(&[TOKEN, ": pi"].concat(), TOKEN, 1, "engine_incomplete");
    check(&[TOKEN, FINISH, &TOKEN[..30]].concat(), &[TOKEN, FINISH, DONE].concat(), 1, "done");
}

#[test]
fn done_without_a_finish_reason_is_incomplete_and_does_not_pass() {
    check(&[TOKEN, DONE].concat(), TOKEN, 1, "engine_incomplete");
    check(DONE, "", 0, "engine_incomplete");
}

#[test]
fn an_error_ends_the_stream_and_what_came_before_it_passes() {
    let before = &VLLM_KILLED_CORE[..VLLM_KILLED_CORE.find("data: {\"error\"").unwrap()];
    check(VLLM_KILLED_CORE, before, 3, "engine_in_stream");
    check(VLLM_DEAD_CORE, "", 0, "engine_in_stream");
    check(&[TOKEN, ERROR, FINISH, DONE].concat(), TOKEN, 1, "engine_in_stream");
    check(&[TOKEN, FINISH, ERROR].concat(), &[TOKEN, FINISH].concat(), 1, "engine_in_stream");
}

#[test]
fn an_error_carries_the_engines_words() {
    let mut relay = Relay::new("http://engine".into(), Endpoint::ChatCompletions);
    relay.read(Bytes::from_static(VLLM_DEAD_CORE.as_bytes()));
    let said = relay.next().unwrap().unwrap_err().to_string();
    assert!(said.starts_with("http://engine failed within the stream: EngineCore encountered an issue."), "{said}");
}

#[test]
fn nothing_passes_after_done() {
    check(&[TOKEN, FINISH, DONE, TOKEN, ERROR, DONE].concat(), &[TOKEN, FINISH, DONE].concat(), 1, "done");
}

#[test]
fn comments_and_foreign_events_pass() {
    let stream = [": ping\n\n", TOKEN, "event: x\ndata: y\n\n", FINISH, ": bye\r\n\r\n", DONE].concat();
    check(&stream, &stream, 1, "done");
}

#[test]
fn a_broken_connection_ends_an_unfinished_stream() {
    let mut relay = Relay::new("http://engine".into(), Endpoint::ChatCompletions);
    relay.read(Bytes::from_static(TOKEN.as_bytes()));
    relay.broke("connection reset".into());
    relay.end();
    assert_eq!(collect(&mut relay), Got { text: TOKEN.into(), tokens: 1, end: "engine_broken" });
}

#[test]
fn a_break_after_done_is_nobodys_business() {
    let mut relay = Relay::new("http://engine".into(), Endpoint::ChatCompletions);
    relay.read(Bytes::from([TOKEN, FINISH, DONE].concat()));
    relay.broke("connection reset".into());
    assert_eq!(collect(&mut relay).end, "done");
}

#[test]
fn an_endless_frame_is_not_kept() {
    let mut relay = Relay::new("http://engine".into(), Endpoint::ChatCompletions);
    for _ in 0..=dynamo_engine_api::sse::MAX_FRAME_BYTES >> 20 {
        relay.read(Bytes::from(vec![b'x'; 1 << 20]));
    }
    assert_eq!(collect(&mut relay).end, "engine_protocol");
}

proptest! {
    #[test]
    fn how_the_network_cuts_a_stream_changes_nothing(
        frames in prop::collection::vec(prop::sample::select(vec![TOKEN, FINISH, ERROR, DONE, ": ping\n\n", "data: {\"choi"]), 0..8),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let stream = frames.concat();
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).chain([0, stream.len()]).collect();
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|cut| &stream.as_bytes()[cut[0]..cut[1]]);
        prop_assert_eq!(relayed(pieces), relayed([stream.as_bytes()]));
    }
}
