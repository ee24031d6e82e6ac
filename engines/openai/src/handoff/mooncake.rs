//! vLLM's MooncakeConnector: both legs at once, under a `transfer_id` of ours; who prefills is asked of its bootstrap server.
//!
//! An engine that restarts has another id, so that what was asked is kept for seconds only. The prefill leg must end by its
//! length, or its KV is thrown away. Read in vLLM 0.32 and 0.33 (`v1/mooncake/mooncake_connector.py`); no pair of that kind has
//! been at hand.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use dynamo_engine_api::{Endpoint, EngineError, Protocol, Ticket};
use serde::{Deserialize, Serialize};

use super::{
    nixl::{PARAMS, one_token},
    raw, unique,
};
use crate::{body::Fields, control::Control, engine::SetupError, options::OpenAiOptions, url::EngineUrl};

const QUERY: &str = "/query";
const KEPT: Duration = Duration::from_secs(5);
/// Longest id of an engine; vLLM's are UUIDs.
const MAX_ID_BYTES: usize = 256;

/// The bootstrap server of an engine that prefills.
#[derive(Debug)]
pub(super) struct Mooncake {
    address: String,
    control: Control,
    known: Mutex<Option<(Instant, Arc<Engines>)>>,
}

/// Ids by data-parallel rank.
type Engines = BTreeMap<u32, Entry>;

#[derive(Debug, Deserialize)]
struct Entry {
    engine_id: String,
}

impl Mooncake {
    pub(super) fn new(host: &str, options: &OpenAiOptions) -> Result<Self, SetupError> {
        let url = EngineUrl::parse(&format!("http://{host}:{}", options.bootstrap_port))?;
        let address = url.name.clone();
        // It is another server than the engine's: its secrets are not for it.
        let options = OpenAiOptions { bearer: None, ..options.clone() };
        let control = Control::new(address.as_str().into(), url, &options, None);
        Ok(Self { address, control, known: Mutex::default() })
    }

    pub(super) async fn ticket(&self, rank: Option<u32>) -> Result<Ticket, EngineError> {
        let engines = self.engines().await?;
        let engine_id = of_rank(&engines, rank).map_err(|reason| self.control.protocol(QUERY, reason))?;
        let params = Params {
            do_remote_prefill: true,
            do_remote_decode: false,
            remote_engine_id: engine_id,
            remote_bootstrap_addr: &self.address,
            transfer_id: &unique::name(),
        };
        let state = raw(serde_json::to_string(&params).expect("texts are JSON"));
        Ok(Ticket { protocol: Protocol::Mooncake, state, prompt_ids: None, cached_tokens: None, bytes: None })
    }

    async fn engines(&self) -> Result<Arc<Engines>, EngineError> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, engines)) = &*known()
            && at.elapsed() < KEPT
        {
            return Ok(engines.clone());
        }
        let reply = self.control.get(QUERY).await?;
        if !reply.status.is_success() {
            return Err(self.control.unhealthy(QUERY, &reply));
        }
        let engines: Arc<Engines> = Arc::new(self.control.json(QUERY, &reply.body)?);
        *known() = Some((Instant::now(), engines.clone()));
        Ok(engines)
    }
}

fn of_rank(engines: &Engines, rank: Option<u32>) -> Result<&str, String> {
    let entry = match (rank, engines.len()) {
        (_, 0) => return Err("no engine has registered; is it started with MooncakeConnector, and ready?".to_owned()),
        (Some(rank), _) => engines.get(&rank).ok_or_else(|| format!("it has no rank {rank}"))?,
        (None, 1) => engines.values().next().ok_or("no engine has registered")?,
        (None, ranks) => return Err(format!("it has {ranks} data-parallel ranks; say so by ranks = {ranks}")),
    };
    let id = &entry.engine_id;
    if id.is_empty() || id.len() > MAX_ID_BYTES { Err(format!("an engine_id of {} bytes", id.len())) } else { Ok(id) }
}

#[derive(Serialize)]
struct Params<'a> {
    do_remote_prefill: bool,
    do_remote_decode: bool,
    remote_engine_id: &'a str,
    remote_bootstrap_addr: &'a str,
    transfer_id: &'a str,
}

pub(super) fn prefill(ticket: &Ticket, endpoint: Endpoint, fields: &mut Fields) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Named {
        transfer_id: String,
    }
    #[derive(Serialize)]
    struct Prefill {
        do_remote_decode: bool,
        do_remote_prefill: bool,
        transfer_id: String,
    }
    let named: Named = serde_json::from_str(ticket.state.get()).map_err(|error| format!("its ticket cannot be read: {error}"))?;
    let prefill = Prefill { do_remote_decode: true, do_remote_prefill: false, transfer_id: named.transfer_id };
    one_token(endpoint, fields);
    fields.instead(PARAMS, serde_json::to_string(&prefill).expect("texts are JSON"));
    Ok(())
}

pub(super) fn decode(ticket: &Ticket, fields: &mut Fields) {
    fields.instead(PARAMS, ticket.state.get());
}
