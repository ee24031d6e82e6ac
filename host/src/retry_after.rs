//! `Retry-After`: whoever says it, a client is never told to stay away for longer than a day.

use std::time::{Duration, UNIX_EPOCH};

use dynamo_host_core::admission::MAX_RETRY_AFTER_MS;
use http::{HeaderMap, HeaderValue, header::RETRY_AFTER};

use crate::clock::unix_ms;

/// The longest, as for policies.
const MAX_SECONDS: u64 = MAX_RETRY_AFTER_MS as u64 / 1000;

/// The header's value for a wait. It knows whole seconds: later rather than too early.
pub(crate) fn value(wait: Duration) -> HeaderValue {
    HeaderValue::from(wait.as_millis().div_ceil(1000).min(u128::from(MAX_SECONDS)) as u64)
}

/// Bounds what an engine says, be it seconds or a date; what is neither is left out.
pub(crate) fn bound(headers: &mut HeaderMap) {
    let Some(said) = headers.get(RETRY_AFTER) else { return };
    match said.to_str().ok().and_then(|said| seconds(said.trim(), unix_ms())) {
        Some(seconds) => {
            headers.insert(RETRY_AFTER, value(Duration::from_secs(seconds)));
        }
        None => {
            headers.remove(RETRY_AFTER);
        }
    }
}

fn seconds(said: &str, now_unix_ms: u64) -> Option<u64> {
    if !said.is_empty() && said.bytes().all(|byte| byte.is_ascii_digit()) {
        // One that no number holds is too long in any case.
        return Some(said.parse().unwrap_or(u64::MAX));
    }
    // Not as it should be said, but some do.
    if let Some(seconds) = said.parse::<f64>().ok().filter(|seconds| *seconds >= 0.0) {
        return Some(seconds.ceil() as u64);
    }
    let at_ms = httpdate::parse_http_date(said).ok()?.duration_since(UNIX_EPOCH).ok()?.as_millis() as u64;
    Some(at_ms.saturating_sub(now_unix_ms).div_ceil(1000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_bounded_however_they_are_said() {
        let now = 1_700_000_000_000;
        for (said, meant) in [
            ("7", Some(7)),
            ("0.2", Some(1)),
            ("99999999999999999999999999", Some(u64::MAX)),
            ("inf", Some(u64::MAX)),
            ("Tue, 14 Nov 2023 22:13:30 GMT", Some(10)),
            ("Tue, 14 Nov 2023 22:13:10 GMT", Some(0)),
            ("-1", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(seconds(said, now), meant, "{said:?}");
        }
        let bounded = |said: &str| {
            let mut headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_str(said).unwrap())]);
            bound(&mut headers);
            headers.get(RETRY_AFTER).map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(bounded("31536000000000").as_deref(), Some("86400"));
        assert_eq!(bounded("Fri, 31 Dec 9999 23:59:59 GMT").as_deref(), Some("86400"));
        assert_eq!(bounded("60").as_deref(), Some("60"));
        assert_eq!(bounded("never"), None);
    }

    #[test]
    fn a_wait_is_told_in_whole_seconds_and_not_too_early() {
        let told = |ms| value(Duration::from_millis(ms)).to_str().unwrap().parse::<u64>().unwrap();
        assert_eq!([told(0), told(1), told(1000), told(u64::from(u32::MAX))], [0, 1, 1, 86_400]);
    }
}
