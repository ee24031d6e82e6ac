//! SGLang: the same body to both at once; they meet in a room of the prefill engine's bootstrap server.
//!
//! A room is never used again, not for another attempt either: who is late would meet the wrong one. Who decodes makes all of the
//! stream; the prefill engine's answer is for nobody. Where the prefill engine has data-parallel ranks, the one that was chosen is
//! named to both, since who decodes would take the room modulo the ranks otherwise. Read in SGLang 0.5.23; no pair of that kind
//! has been at hand.

use dynamo_engine_api::{Protocol, Ticket};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{raw, unique};
use crate::body::Fields;

/// Where the other side finds an engine that prefills.
#[derive(Debug)]
pub(super) struct Bootstrap {
    host: String,
    port: u16,
}

#[derive(Serialize)]
struct Room<'a> {
    bootstrap_host: &'a str,
    bootstrap_port: u16,
    bootstrap_room: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    disagg_prefill_dp_rank: Option<u32>,
}

/// The same, as it is put into a body.
#[derive(Deserialize)]
struct Put<'a> {
    #[serde(borrow)]
    bootstrap_host: &'a RawValue,
    #[serde(borrow)]
    bootstrap_port: &'a RawValue,
    #[serde(borrow)]
    bootstrap_room: &'a RawValue,
    #[serde(borrow, default)]
    disagg_prefill_dp_rank: Option<&'a RawValue>,
}

impl Bootstrap {
    pub(super) fn new(host: &str, port: u16) -> Self {
        Self { host: host.to_owned(), port }
    }

    pub(super) fn ticket(&self, rank: Option<u32>) -> Ticket {
        let room = Room {
            bootstrap_host: &self.host,
            bootstrap_port: self.port,
            bootstrap_room: unique::number(),
            disagg_prefill_dp_rank: rank,
        };
        let state = raw(serde_json::to_string(&room).expect("texts and numbers are JSON"));
        Ticket { protocol: Protocol::Bootstrap, state, prompt_ids: None, cached_tokens: None, bytes: None }
    }
}

/// What both legs are asked.
pub(super) fn both(ticket: &Ticket, fields: &mut Fields) -> Result<(), String> {
    let put: Put<'_> = serde_json::from_str(ticket.state.get()).map_err(|error| format!("its ticket cannot be read: {error}"))?;
    fields.instead("bootstrap_host", put.bootstrap_host);
    fields.instead("bootstrap_port", put.bootstrap_port);
    fields.instead("bootstrap_room", put.bootstrap_room);
    match put.disagg_prefill_dp_rank {
        Some(rank) => fields.instead("disagg_prefill_dp_rank", rank),
        None => fields.without("disagg_prefill_dp_rank"),
    }
    Ok(())
}
