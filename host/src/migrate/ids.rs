//! Token ids that the host asked an engine for, taken out of what its client gets.

use bytes::{Bytes, BytesMut};
use memchr::{memchr, memmem};

/// How a list of ids begins, under either of its names. Within a JSON string its quote would have a backslash before it.
const BEGIN: &[u8] = b"token_ids\":[";
/// What may be before it, so that the name is one of them.
const BEFORE: [&[u8]; 2] = [b"\"", b"\"prompt_"];

/// The frames with `null` in place of each list of token ids, as engines write them that were not asked. Frames without any
/// are the very same bytes.
pub(crate) fn without_ids(frames: Bytes) -> Bytes {
    let Some(first) = memmem::find(&frames, BEGIN) else { return frames };
    let mut out = BytesMut::with_capacity(frames.len());
    let (mut kept, mut at) = (0, first);
    loop {
        let list = at + BEGIN.len();
        let length = memchr(b']', &frames[list..]).filter(|&length| is_ids(&frames[list..list + length]));
        let mut from = list;
        if let Some(length) = length.filter(|_| BEFORE.iter().any(|name| frames[..at].ends_with(name))) {
            out.extend_from_slice(&frames[kept..list - 1]);
            out.extend_from_slice(b"null");
            kept = list + length + 1;
            from = kept;
        }
        match memmem::find(&frames[from..], BEGIN) {
            Some(next) => at = from + next,
            None => break,
        }
    }
    out.extend_from_slice(&frames[kept..]);
    out.freeze()
}

fn is_ids(list: &[u8]) -> bool {
    list.iter().all(|byte| matches!(byte, b'0'..=b'9' | b',' | b' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_ids_become_null_and_texts_that_look_like_them_stay() {
        let frames = "data: {\"choices\":[{\"text\":\"a \\\"token_ids\\\":[1]\",\"prompt_token_ids\":[7,8],\"token_ids\":[9]}]}\n\n\
                      data: {\"choices\":[{\"token_ids\":[],\"text\":\"é\"}],\"prompt_token_ids\":null}\n\n";
        let bare = "data: {\"choices\":[{\"text\":\"a \\\"token_ids\\\":[1]\",\"prompt_token_ids\":null,\"token_ids\":null}]}\n\n\
                    data: {\"choices\":[{\"token_ids\":null,\"text\":\"é\"}],\"prompt_token_ids\":null}\n\n";
        assert_eq!(without_ids(Bytes::from_static(frames.as_bytes())), bare);
        for other in ["{\"token_ids\":[[1],[2]]}", "{\"stop_token_ids\":[1]}", "{\"token_ids\":[\"]\"]}", "{\"token_ids\":[1"] {
            assert_eq!(without_ids(Bytes::from_static(other.as_bytes())), other, "these are none of ours");
        }
        let none = Bytes::from_static(b"data: {\"token_ids\":null}\n\n");
        assert_eq!(without_ids(none.clone()).as_ptr(), none.as_ptr());
    }
}
