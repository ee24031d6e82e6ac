//! `routing-answer`: what the policy says, taken down as it is said. It is judged when the call has returned.

use dynamo_host_core::{Answer, answer::MAX_RANKED};

use super::{Bytes, Interface, define, define_void};
use crate::call::{Explanation, Guest};

/// Terms that one decision may explain.
const MAX_TERMS: usize = 16;
/// Candidates above which no reasons are asked for: they cost the policy fuel that it may need for its decision.
const MAX_EXPLAINED: u32 = 1024;
/// Values of a term that is not about candidates.
const MIN_VALUES: usize = 256;

pub(super) fn link(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define_void(interface, "place", |guest: &mut Guest, (mut rows,): (Vec<u32>,)| {
        let bytes = size_of_val(&*rows);
        // One more than is allowed is enough to see that there are too many.
        rows.truncate(MAX_RANKED + 1);
        answer(guest, "place", Answer::Place(rows), bytes)
    })?;
    define_void(interface, "place-disaggregated", |guest: &mut Guest, (mut pairs,): (Vec<(u32, u32)>,)| {
        let bytes = size_of_val(&*pairs);
        pairs.truncate(MAX_RANKED + 1);
        answer(guest, "place-disaggregated", Answer::PlaceDisaggregated(pairs), bytes)
    })?;
    define_void(interface, "hold", |guest: &mut Guest, (at_most_ms,): (u32,)| {
        answer(guest, "hold", Answer::Hold { at_most_ms }, 0)
    })?;
    define_void(interface, "reject", |guest: &mut Guest, (status, retry_after_ms, reason): (u16, Option<u32>, String)| {
        let rejection = guest.rejection(status, retry_after_ms, &reason);
        answer(guest, "reject", Answer::Reject(rejection), reason.len())
    })?;
    define(interface, "explain-wanted", |guest: &mut Guest, (): ()| {
        let call = guest.route("explain-wanted")?;
        Ok((call.explain && call.candidates.count() <= MAX_EXPLAINED, 0))
    })?;
    define_void(interface, "explain", |guest: &mut Guest, (term, mut values): (String, Vec<f32>)| {
        let bytes = term.len() + size_of_val(&*values);
        let call = guest.route("explain")?;
        let (is_wanted, count) = (call.explain, call.candidates.count());
        if is_wanted && guest.explanations.len() < MAX_TERMS {
            let term = guest.printable(&term);
            // NaN and infinity have their meaning in costs, and pass.
            values.truncate(MIN_VALUES.max(count as usize));
            values.shrink_to_fit();
            guest.explanations.push(Explanation { term, values });
        }
        Ok(bytes)
    })
}

fn answer(guest: &mut Guest, function: &'static str, answer: Answer, bytes: Bytes) -> wasmtime::Result<Bytes> {
    guest.route(function)?;
    guest.routing = Some(answer);
    Ok(bytes)
}
