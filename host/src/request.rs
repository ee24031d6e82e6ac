//! A request's life, top to bottom: decode → resolve → tokenize → admit → snapshot → **routing policy** → dispatch → relay →
//! account.
//!
//! Each stage is one step here and one module elsewhere. Invariants: a request pins its policy version when it begins
//! and keeps it over all its attempts; a worker that failed it is never asked again; nothing has been sent to the
//! client while it can still go to another worker.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use axum::{body::Body, response::Response};
use bytes::Bytes;
use dynamo_engine_api::{Endpoint, GenerateRequest};
use dynamo_host_core::RequestFacts;
use dynamo_host_policy::{AdmissionSlot, RoutingSlot};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{
    account::Client,
    admit::{self, Permit, Queue},
    auth::Caller,
    body,
    clock::Clock,
    config::{Limits, Migration},
    decode::{Bounds, Decoded, decode, rename},
    dispatch::{Asked, Dispatch},
    error::{Audience, RequestError},
    handoff::Handoffs,
    meters::RequestMeters,
    models::Resolved,
    observe::Observer,
    parts::{self, Several},
    place::place,
    prefixes::Prefixes,
    receipts::Receipts,
    relay::Patience,
    roster::{Roster, Snapshot},
    stop::Stopping,
    trace,
};

/// The header that names the model that served, where it is another than the one asked for.
pub(crate) const MODEL: HeaderName = HeaderName::from_static("x-dynamo-model");

/// What requests need of the host.
pub(crate) struct Lane {
    pub(crate) admission: Arc<AdmissionSlot>,
    pub(crate) routing: Arc<RoutingSlot>,
    pub(crate) queue: Arc<Queue>,
    pub(crate) roster: Arc<Roster>,
    pub(crate) prefixes: Prefixes,
    pub(crate) clock: Clock,
    /// Changed when the configuration is.
    pub(crate) limits: ArcSwap<Limits>,
    /// The same.
    pub(crate) migration: ArcSwap<Migration>,
    pub(crate) meters: RequestMeters,
    pub(crate) observer: Observer,
    pub(crate) receipts: Receipts,
    pub(crate) handoffs: Handoffs,
    pub(crate) expose_worker: bool,
    /// Whether the host goes on.
    pub(crate) stopping: Stopping,
    /// Numbers decisions; also their seed.
    pub(crate) decisions: AtomicU64,
}

impl Lane {
    /// The limits of a request that begins now.
    pub(crate) fn limits(&self) -> Arc<Limits> {
        self.limits.load_full()
    }

    /// Numbers a decision.
    pub(crate) fn next_decision(&self) -> u64 {
        self.decisions.fetch_add(1, Relaxed)
    }

    /// Who is told of errors, in answers.
    pub(crate) fn audience(&self) -> Audience {
        if self.expose_worker { Audience::Operator } else { Audience::Client }
    }
}

/// A request as it came in.
pub(crate) struct Arrival {
    pub(crate) endpoint: Endpoint,
    /// The client's `x-request-id`, or one of ours.
    pub(crate) id: String,
    pub(crate) session_key: Option<u64>,
    /// How long the client gives it, altogether.
    pub(crate) timeout: Option<Duration>,
    pub(crate) caller: Caller,
    /// What goes with it to the engine.
    pub(crate) headers: HeaderMap,
    pub(crate) body: Body,
    pub(crate) at: Instant,
}

/// What is known of a request by the time that it fails.
#[derive(Default)]
pub(crate) struct Notes {
    /// Its model, if it is one that is served.
    pub(crate) model: Option<String>,
    /// Who decided last.
    pub(crate) policy: Option<String>,
    /// For how long it waited for its turn, if it came so far.
    pub(crate) queued: Option<Duration>,
}

/// Serves one request.
pub(crate) async fn serve(lane: &Arc<Lane>, arrival: Arrival, notes: &mut Notes) -> Result<Response, RequestError> {
    let Arrival { endpoint, id, session_key, timeout, caller, headers, body, at } = arrival;
    let limits = lane.limits();
    let body = body::read(body, &limits).await?;

    let begun = Instant::now();
    let bounds = Bounds { max_output_tokens: limits.max_output_tokens, max_choices: limits.max_choices };
    let Decoded { mut facts, mut body, stream, returns_ids } = decode(endpoint, id, body, bounds)?;
    caller.vouch(&mut facts)?;
    let patience = Patience::since(at, &limits, timeout);
    facts.accepted_ms = lane.clock.at_ms(at);
    facts.deadline_ms = Some(lane.clock.at_ms(patience.deadline));
    facts.session_key = session_key;
    let request_id: Arc<str> = facts.id.as_str().into();
    lane.meters.decode.record(begun.elapsed());
    trace::stage("decode", begun);

    lane.roster.hold(&facts.model, patience.deadline.into()).await;
    let (renamed, prompt) = {
        let snapshot = lane.roster.snapshot();
        let renamed = resolve(&snapshot, &mut facts, &mut body)?;
        notes.model = snapshot.fleet().models().get(&facts.model).cloned();
        // For nobody, nothing is computed.
        if parts::of(lane, &snapshot, &facts, &body, &limits)?.is_none() && !snapshot.has_way(&facts, lane.roster.links()) {
            return Err(snapshot.no_worker(&facts));
        }
        let begun = Instant::now();
        let prompt = lane.prefixes.read(&mut facts, &body, &snapshot).await;
        lane.meters.tokenize.record(begun.elapsed());
        trace::stage("tokenize", begun);
        (renamed, Arc::new(prompt))
    };
    let entering = Instant::now();
    let entered = admit::enter(lane, &mut facts).await;
    let queued = entered.as_ref().map_or_else(|_| entering.elapsed(), Permit::waited);
    notes.queued = Some(queued);
    let permit = entered?;
    let pinned = lane.routing.pin();
    let priority = facts.priority;
    let migration = lane.migration.load_full();
    let wants_token_ids = migration.enabled && stream;
    let ask = GenerateRequest { headers, priority, wants_token_ids, ..GenerateRequest::new(endpoint, body, stream, request_id) };
    let recorder = lane.receipts.sample();
    let asked = Asked { ask, pinned, prompt, recorder, returns_ids };
    let since = begun + queued;
    // The workers may be others by now.
    let mut response = match parts::of(lane, &lane.roster.snapshot(), &facts, &asked.ask.body, &limits)? {
        None => {
            let dispatch = Dispatch::new(lane, asked, permit, Client::new(at), patience, migration);
            answered(dispatch, &mut facts, notes, since).await?
        }
        Some(parts) => {
            let several = Several { asked, facts, permit, patience, migration, accepted: at, since, bounds };
            parts::serve(lane, several, parts, notes).await?
        }
    };
    // A name that cannot be a header value came from the operator's own or an engine's: leave it out.
    response.headers_mut().extend(renamed.and_then(|name| HeaderValue::from_str(&name).ok()).map(|name| (MODEL, name)));
    Ok(response)
}

/// Places a request, or a part of one, and gives it to workers until it is answered. `since`: when the host began with it, but for
/// the time that it waited.
///
/// # Errors
/// What it failed with for good.
pub(crate) async fn answered(
    mut dispatch: Dispatch<'_>,
    facts: &mut RequestFacts,
    notes: &mut Notes,
    since: Instant,
) -> Result<Response, RequestError> {
    let (lane, patience) = (dispatch.lane, dispatch.patience);
    loop {
        let inquiry = dispatch.asked().inquiry(dispatch.part(), &patience, None);
        let placing = match place(lane, &inquiry, facts, notes).await {
            Ok(placing) => placing,
            // Every worker has failed it: what the last one failed with says more.
            Err(RequestError::NoWorker { .. }) if dispatch.outlasts(facts).await => continue,
            Err(error @ RequestError::NoWorker { .. }) => return Err(dispatch.into_failure().map_or(error, RequestError::from)),
            Err(error) => return Err(error),
        };
        if facts.attempt == 0 {
            lane.meters.dispatch.record(since.elapsed().saturating_sub(placing.held));
        }
        let dispatched = Instant::now();
        let answered = dispatch.carry_out(&placing, facts, notes).await;
        trace::stage("dispatch", dispatched);
        if let Some(response) = answered? {
            return Ok(response);
        }
        facts.attempt += 1;
    }
}

/// Finds what the client's name for a model is served as, and has the body say so. Returns the real name if it is another.
fn resolve(snapshot: &Snapshot, facts: &mut RequestFacts, body: &mut Bytes) -> Result<Option<String>, RequestError> {
    let Resolved { name, model, adapter, is_fallback } = snapshot.resolve(&facts.model)?;
    let asked = std::mem::replace(&mut facts.model, model);
    facts.adapter = adapter;
    if name == asked {
        return Ok(None);
    }
    if is_fallback {
        metrics::counter!("dynamo_host_model_fallbacks_total", "model" => asked, "to" => name.clone()).increment(1);
    }
    *body = rename(body, &name);
    Ok(Some(name))
}
