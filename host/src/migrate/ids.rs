//! Token ids that the host asked an engine for, taken out of what its client gets.

use bytes::{Bytes, BytesMut};
use memchr::{memchr, memmem};

/// How a list of ids begins, under either of its names. Within a JSON string its quote would have a backslash before it.
const BEGIN: &[u8] = b"token_ids\":[";

/// The frames with `null` in place of each list of token ids, as engines write them that were not asked. Frames without any
/// are the very same bytes.
pub(crate) fn without_ids(frames: Bytes) -> Bytes {
    let Some(first) = memmem::find(&frames, BEGIN) else { return frames };
    let mut out = BytesMut::with_capacity(frames.len());
    let (mut kept, mut at) = (0, first);
    loop {
        let list = at + BEGIN.len() - 1;
        let Some(length) = memchr(b']', &frames[list..]) else { break };
        out.extend_from_slice(&frames[kept..list]);
        out.extend_from_slice(b"null");
        kept = list + length + 1;
        match memmem::find(&frames[kept..], BEGIN) {
            Some(next) => at = kept + next,
            None => break,
        }
    }
    out.extend_from_slice(&frames[kept..]);
    out.freeze()
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
        let none = Bytes::from_static(b"data: {\"token_ids\":null}\n\n");
        assert_eq!(without_ids(none.clone()).as_ptr(), none.as_ptr());
    }
}
