use proptest::prelude::*;

use super::*;

const STREAM: &str = concat!(
    ": ping\n\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\\n\\nb\"},\"finish_reason\":null}]}\r\n\r\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"reasoning_content\":\"hm\"}}]}\n\n",
    "data: {\"choices\":[{\"index\":0,\"text\":\"xy\",\"token_ids\":[1,2,3]}]}\n\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":[{\"index\":0}]},\"finish_reason\":\"tool_calls\"}]}\n\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":6,\"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\n",
    "data: [DONE]\n\n",
);

fn read_all(pieces: &[&[u8]]) -> (Vec<u8>, Summary) {
    let mut framer = Framer::default();
    let mut bytes = Vec::new();
    let mut total = Summary::default();
    let mut take = |chunk: Option<Chunk>| {
        let Some(chunk) = chunk else { return };
        bytes.extend_from_slice(&chunk.bytes);
        total.add(chunk.summary);
    };
    for piece in pieces {
        take(framer.push(Bytes::copy_from_slice(piece)).unwrap());
    }
    take(framer.finish());
    (bytes, total)
}

#[test]
fn a_stream_is_counted_and_kept_verbatim() {
    let (bytes, total) = read_all(&[STREAM.as_bytes()]);
    assert_eq!(bytes, STREAM.as_bytes());
    assert_eq!((total.tokens, total.finishes, total.done), (6, 1, true));
    let usage = total.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (9, 6));
    assert_eq!(usage.prompt_tokens_details.unwrap().cached_tokens, Some(4));
}

#[test]
fn an_error_object_is_seen() {
    let (_, total) = read_all(&[b"data: {\"error\":{\"message\":\"EngineCore died\",\"code\":500}}\n\ndata: [DONE]\n\n"]);
    assert_eq!(total.error.as_deref(), Some("EngineCore died"));
    let (_, total) = read_all(&[b"data: {\"error\":\"plain\"}\n\n"]);
    assert_eq!(total.error.as_deref(), Some("\"plain\""));
    let (_, total) = read_all(&[b"data: {\"error\":null,\"choices\":[]}\n\n"]);
    assert_eq!(total.error, None);
}

#[test]
fn the_frame_that_ends_a_stream_is_found_among_others() {
    let before = "event: x\ndata: {\"choices\":[{\"text\":\"a\"}]}\r\n\r\n: ping\n\n";
    let error = "event: error\ndata: {\"error\":{\"message\":\"dead\"},\"choices\":null}\n\n";
    let chunk = Chunk::new(Bytes::from([before, error, "data: [DONE]\n\n"].concat()));
    let ending = chunk.ending().unwrap();
    assert_eq!(ending.at, before.len()..before.len() + error.len());
    assert_eq!((ending.summary.error.as_deref(), ending.summary.done), (Some("dead"), false));
    let before = chunk.clone().until(ending.at.start).unwrap();
    assert_eq!((before.summary.tokens, before.summary.error), (1, None));
    assert_eq!(chunk.until(0), None);
    assert_eq!(Chunk::done(Endpoint::Completions).ending().unwrap().at, 0..DONE_FRAME.len());
    assert_eq!(Chunk::new(Bytes::from_static(b"data: {}\n\n")).ending(), None);
}

#[test]
fn a_last_frame_without_its_blank_line_is_not_lost() {
    let (bytes, total) = read_all(&[b"data: [DONE]"]);
    assert_eq!(bytes, b"data: [DONE]\n\n");
    assert!(total.done);
}

#[test]
fn what_is_not_json_is_relayed_unread() {
    let (bytes, total) = read_all(&[b"event: x\ndata: nonsense\n\n"]);
    assert_eq!(bytes, b"event: x\ndata: nonsense\n\n");
    assert_eq!(total, Summary::default());
}

#[test]
fn a_frame_without_end_is_refused_at_its_bound() {
    let mut framer = Framer::default();
    let megabyte = Bytes::from(vec![b'x'; 1 << 20]);
    let refused = (0..=(MAX_FRAME_BYTES >> 20)).find_map(|_| framer.push(megabyte.clone()).err());
    assert_eq!(refused, Some(FrameTooLarge));
}

#[test]
fn a_read_that_ends_on_a_border_is_not_copied() {
    let read = Bytes::from_static(b"data: {}\n\n");
    let chunk = Framer::default().push(read.clone()).unwrap().unwrap();
    assert_eq!(chunk.bytes.as_ptr(), read.as_ptr());
}

proptest! {
    #[test]
    fn how_the_network_cuts_a_stream_changes_nothing(cuts in prop::collection::vec(0..STREAM.len(), 0..40)) {
        let mut cuts = cuts;
        cuts.sort_unstable();
        let mut pieces = Vec::new();
        let mut from = 0;
        for cut in cuts {
            pieces.push(&STREAM.as_bytes()[from..cut]);
            from = cut;
        }
        pieces.push(&STREAM.as_bytes()[from..]);
        let (bytes, total) = read_all(&pieces);
        prop_assert_eq!(bytes, STREAM.as_bytes());
        prop_assert_eq!((total.tokens, total.finishes, total.done), (6, 1, true));
    }
}

const RESPONSES: &str = include_str!("fixtures/vllm_responses.sse");
const MESSAGES: &str = include_str!("fixtures/vllm_messages.sse");

#[test]
fn streams_of_responses_and_messages_are_counted_and_end_with_their_last_event() {
    for (stream, tokens, usage, last) in [(RESPONSES, 2, (11, 3), "response.completed"), (MESSAGES, 3, (11, 3), "message_stop")] {
        let (bytes, total) = read_all(&[stream.as_bytes()]);
        assert_eq!(bytes, stream.as_bytes());
        assert_eq!((total.tokens, total.finishes, total.done, total.error), (tokens, 1, true, None), "{last}");
        let counted = total.usage.map(|usage| (usage.prompt_tokens, usage.completion_tokens));
        assert_eq!(counted, Some(usage), "{last}");
        let ending = Chunk::new(Bytes::from_static(stream.as_bytes())).ending().unwrap();
        assert!(stream[ending.at].contains(&format!("event: {last}")));
    }
}

#[test]
fn an_error_of_a_typed_stream_is_seen() {
    for (frame, says) in [
        ("event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"busy\"}}\n\n", "busy"),
        ("event: error\ndata: {\"type\":\"error\",\"message\":\"busy\",\"code\":null}\n\n", "busy"),
        ("data: {\"type\":\"response.failed\",\"response\":{\"error\":{\"message\":\"busy\"}}}\n\n", "busy"),
        ("data: {\"type\":\"response.failed\"}\n\n", "the response failed"),
    ] {
        assert_eq!(read_all(&[frame.as_bytes()]).1.error.as_deref(), Some(says), "{frame}");
    }
}
