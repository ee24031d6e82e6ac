//! Reads a request's body, within its bounds of size and time.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

use crate::{config::Limits, error::RequestError};

/// Bytes of a body that is too large that are read on and thrown away.
const MAX_DISCARDED_BYTES: usize = 64 << 20;

/// Collects a body up to its bound. One that is larger is read on for a while all the same: a client that is still
/// writing when the connection closes sees a reset, not the answer.
pub(crate) async fn read(mut body: Body, limits: &Limits) -> Result<Bytes, RequestError> {
    let max_bytes = limits.max_body_bytes;
    let declared = HttpBody::size_hint(&body).lower();
    let mut is_too_large = declared > max_bytes as u64;
    let mut collected = BytesMut::with_capacity(if is_too_large { 0 } else { declared as usize });
    let mut discarded = 0;
    let read = async {
        while discarded < MAX_DISCARDED_BYTES
            && let Some(frame) = body.frame().await
        {
            let frame = frame.map_err(|error| RequestError::BodyUnread { reason: error.to_string() })?;
            let Ok(data) = frame.into_data() else { continue };
            is_too_large |= collected.len() + data.len() > max_bytes;
            if is_too_large {
                discarded += data.len();
            } else {
                collected.extend_from_slice(&data);
            }
        }
        if is_too_large { Err(RequestError::BodyTooLarge { max_bytes }) } else { Ok(collected.freeze()) }
    };
    let seconds = limits.body_timeout_s;
    tokio::time::timeout(Duration::from_secs(seconds), read).await.unwrap_or(Err(RequestError::BodySlow { seconds }))
}
