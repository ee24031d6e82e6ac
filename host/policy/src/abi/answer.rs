//! `routing-answer`: what the policy says, taken down as it is said. It is judged when the call has returned.

use dynamo_host_core::{Answer, Rejection, answer::MAX_RANKED};

use super::{Interface, define, define_void};
use crate::call::{Explanation, Guest};

/// Terms that one decision may explain.
const MAX_TERMS: usize = 16;

pub(super) fn link(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define_void(interface, "place", |guest: &mut Guest, (mut rows,): (Vec<u32>,)| {
        guest.charge(4 * rows.len())?;
        // One more than is allowed is enough to see that there are too many.
        rows.truncate(MAX_RANKED + 1);
        answer(guest, "place", Answer::Place(rows))
    })?;
    define_void(interface, "place-disaggregated", |guest: &mut Guest, (mut pairs,): (Vec<(u32, u32)>,)| {
        guest.charge(8 * pairs.len())?;
        pairs.truncate(MAX_RANKED + 1);
        answer(guest, "place-disaggregated", Answer::PlaceDisaggregated(pairs))
    })?;
    define_void(interface, "hold", |guest: &mut Guest, (at_most_ms,): (u32,)| {
        answer(guest, "hold", Answer::Hold { at_most_ms })
    })?;
    define_void(interface, "reject", |guest: &mut Guest, (status, retry_after_ms, reason): (u16, Option<u32>, String)| {
        guest.charge(reason.len())?;
        let reason = reason[..reason.floor_char_boundary(1024)].to_owned();
        answer(guest, "reject", Answer::Reject(Rejection { status, retry_after_ms, reason }))
    })?;
    define(interface, "explain-wanted", |guest: &mut Guest, (): ()| Ok(guest.route("explain-wanted")?.explain))?;
    define_void(interface, "explain", |guest: &mut Guest, (term, values): (String, Vec<f32>)| {
        guest.charge(term.len() + 4 * values.len())?;
        if guest.route("explain")?.explain && guest.explanations.len() < MAX_TERMS {
            guest.explanations.push(Explanation { term, values });
        }
        Ok(())
    })
}

fn answer(guest: &mut Guest, function: &'static str, answer: Answer) -> wasmtime::Result<()> {
    guest.route(function)?;
    guest.answer = Some(answer);
    Ok(())
}
