//! CORS: which web pages may ask the front door, if any may. Off unless it is configured.

use std::time::Duration;

use http::{HeaderValue, Method};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::QUEUE_MS;
use crate::{
    config::Cors,
    relay::{POLICY, PREFILL_WORKER, REQUEST_ID, WORKER},
    request::MODEL,
};

/// Answers preflights, and says on each answer which pages may read it. Credentials are keys in headers, never cookies.
pub(super) fn layer(cors: &Cors) -> CorsLayer {
    let origins = match cors.origins.as_slice() {
        [any] if any == "*" => AllowOrigin::any(),
        // What is no header value was refused with the configuration.
        origins => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([REQUEST_ID, POLICY, WORKER, PREFILL_WORKER, MODEL, QUEUE_MS])
        .max_age(Duration::from_secs(u64::from(cors.max_age_s)))
}
