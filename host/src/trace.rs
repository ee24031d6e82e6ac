//! Distributed traces: the client's W3C trace context, handed on to engines; and spans of our own over OTLP, where
//! that is configured.
//!
//! Contract: without OTLP a valid context passes as it came, since a span that nobody exports must not become the
//! parent of an engine's; with it, engines get our span as their parent, and a trace begins here if none came. What is
//! not valid is as if it had not come. No span has a word of a prompt.
//!
//! Spec: <https://www.w3.org/TR/trace-context/>

mod layer;
mod otlp;

use std::time::Instant;

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

pub(crate) use self::{
    layer::{SpanFacts, attach},
    otlp::{Otlp, OtlpError, Traces},
};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Longest `tracestate` that is handed on; the specification asks for at least so much.
const MAX_STATE_BYTES: usize = 512;

/// The target of events that tell of a stage; each becomes a span of an exported trace.
const STAGE: &str = "dynamo_host::stage";

/// Tells that a stage of the current request is over. Costs nothing unless somebody listens.
pub(crate) fn stage(name: &'static str, begun: Instant) {
    tracing::debug!(target: STAGE, stage = name, ns = begun.elapsed().as_nanos() as u64);
}

/// A client's trace context: `VERSION-TRACE-PARENT-FLAGS` in lower-case hexadecimal digits.
#[derive(Clone, Debug)]
pub(crate) struct Parent {
    traceparent: HeaderValue,
    tracestate: Option<HeaderValue>,
}

impl Parent {
    /// What the headers say, if it is valid.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let traceparent = headers.get(TRACEPARENT)?;
        if !is_valid(traceparent.as_bytes()) {
            return None;
        }
        let mut states = headers.get_all(TRACESTATE).iter();
        let tracestate = match (states.next(), states.next()) {
            (Some(one), None) => Some(one).filter(|state| state.len() <= MAX_STATE_BYTES && !state.is_empty()),
            // Several lines are one list; who splits it so is rare enough to lose it.
            _ => None,
        };
        Some(Self { traceparent: traceparent.clone(), tracestate: tracestate.cloned() })
    }

    /// Of the trace, 32 digits.
    pub(crate) fn trace_id(&self) -> &str {
        self.digits(3..35)
    }

    fn digits(&self, range: std::ops::Range<usize>) -> &str {
        self.traceparent.to_str().map_or("", |text| &text[range])
    }

    fn context(&self) -> SpanContext {
        let trace = TraceId::from_hex(self.trace_id()).unwrap_or(TraceId::INVALID);
        let parent = SpanId::from_hex(self.digits(36..52)).unwrap_or(SpanId::INVALID);
        let flags = TraceFlags::new(u8::from_str_radix(self.digits(53..55), 16).unwrap_or(0));
        // The vendors' own part is handed on as it came.
        SpanContext::new(trace, parent, flags, true, TraceState::NONE)
    }

    /// Puts the context into an engine's headers as it came.
    pub(crate) fn pass(&self, headers: &mut HeaderMap) {
        headers.insert(TRACEPARENT, self.traceparent.clone());
        self.pass_state(headers);
    }

    fn pass_state(&self, headers: &mut HeaderMap) {
        headers.extend(self.tracestate.clone().map(|state| (TRACESTATE, state)));
    }
}

/// Puts our span into an engine's headers, as its parent.
pub(crate) fn pass_ours(ours: &SpanContext, parent: Option<&Parent>, headers: &mut HeaderMap) {
    let (trace, span, flags) = (ours.trace_id(), ours.span_id(), ours.trace_flags().to_u8());
    let value = HeaderValue::try_from(format!("00-{trace}-{span}-{flags:02x}"));
    headers.insert(TRACEPARENT, value.expect("digits and dashes"));
    parent.into_iter().for_each(|parent| parent.pass_state(headers));
}

fn is_valid(text: &[u8]) -> bool {
    let is_digits =
        |range: std::ops::Range<usize>| text[range].iter().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte));
    let is_zero = |range: std::ops::Range<usize>| text[range].iter().all(|&byte| byte == b'0');
    // A later version may append fields, and is read as far as this one goes.
    let is_long_enough = text.len() == 55 || (text.len() > 55 && text[55] == b'-' && &text[..2] != b"00");
    is_long_enough
        && [2, 35, 52].into_iter().all(|at| text[at] == b'-')
        && [0..2, 3..35, 36..52, 53..55].into_iter().all(is_digits)
        && &text[..2] != b"ff"
        && !is_zero(3..35)
        && !is_zero(36..52)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(traceparent: &str) -> HeaderMap {
        HeaderMap::from_iter([(TRACEPARENT, traceparent.parse().unwrap()), (TRACESTATE, HeaderValue::from_static("a=1"))])
    }

    #[test]
    fn a_valid_context_passes_as_it_came() {
        let parent = Parent::of(&headers(GOOD)).unwrap();
        assert_eq!(parent.trace_id(), "0af7651916cd43dd8448eb211c80319c");
        let mut passed = HeaderMap::new();
        parent.pass(&mut passed);
        assert_eq!(passed, headers(GOOD));
        let context = parent.context();
        assert!(context.is_valid() && context.is_sampled() && context.is_remote());
        assert!(Parent::of(&headers(&format!("cc{}-what-comes", &GOOD[2..]))).is_some(), "a later version");
    }

    #[test]
    fn ours_takes_the_parents_place_and_keeps_the_vendors_state() {
        let parent = Parent::of(&headers(GOOD)).unwrap();
        let span = SpanId::from_hex("00000000000000aa").unwrap();
        let ours = SpanContext::new(parent.context().trace_id(), span, TraceFlags::SAMPLED, false, TraceState::NONE);
        let mut passed = HeaderMap::new();
        pass_ours(&ours, Some(&parent), &mut passed);
        assert_eq!(passed, headers("00-0af7651916cd43dd8448eb211c80319c-00000000000000aa-01"));
    }

    #[test]
    fn what_is_not_valid_is_as_if_it_had_not_come() {
        for wrong in [
            "",
            "00",
            &GOOD[..54],
            &format!("{GOOD}-more"),
            &GOOD.to_uppercase(),
            &GOOD.replace("00-0a", "ff-0a"),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c_b7ad6b7169203331-01",
        ] {
            assert!(Parent::of(&headers(wrong)).is_none(), "{wrong}");
        }
        assert!(Parent::of(&HeaderMap::new()).is_none());
    }
}
