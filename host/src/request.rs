//! A request's life, top to bottom: decode → snapshot → **routing policy** → dispatch → relay → account.
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

use axum::{body::Body, response::Response};
use bytes::{Bytes, BytesMut};
use dynamo_engine_api::{Endpoint, EngineError, GenerateRequest, Reply};
use dynamo_host_core::{Candidates, RequestFacts, answer::Verdict};
use dynamo_host_policy::{DecidedBy, Decision, FaultCause, Pinned, PolicyFault, RouteCall, RoutingSlot};
use http::StatusCode;
use http_body_util::BodyExt;

use crate::{
    clock::{Clock, unix_ms},
    config::Limits,
    decode::{Bounds, Decoded, decode},
    error::RequestError,
    meters::RequestMeters,
    observe::Observer,
    relay::{self, Account, Head},
    roster::{Roster, Snapshot},
};

/// How often a request is placed anew after all workers of a ranking failed it.
const MAX_PLACINGS: u32 = 3;
/// How often a policy may hold one request, and for how long at a time.
const MAX_HOLDS: u32 = 8;
const MAX_HOLD: Duration = Duration::from_secs(2);
/// Bytes of a body that is too large that are read on and thrown away.
const MAX_DISCARDED_BYTES: usize = 64 << 20;

/// What requests need of the host.
pub(crate) struct Lane {
    pub(crate) routing: Arc<RoutingSlot>,
    pub(crate) roster: Arc<Roster>,
    pub(crate) clock: Clock,
    pub(crate) limits: Limits,
    pub(crate) meters: RequestMeters,
    pub(crate) observer: Observer,
    pub(crate) expose_worker: bool,
    /// Numbers decisions; also their seed.
    pub(crate) decisions: AtomicU64,
}

/// A request as it came in.
pub(crate) struct Arrival {
    pub(crate) endpoint: Endpoint,
    /// The client's `x-request-id`, or one of ours.
    pub(crate) id: String,
    pub(crate) session_key: Option<u64>,
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
}

/// Serves one request.
pub(crate) async fn serve(lane: &Lane, arrival: Arrival, notes: &mut Notes) -> Result<Response, RequestError> {
    let Arrival { endpoint, id, session_key, body, at } = arrival;
    let body = read_body(body, &lane.limits).await?;

    let begun = Instant::now();
    let bounds = Bounds { max_output_tokens: lane.limits.max_output_tokens, max_choices: lane.limits.max_choices };
    let Decoded { mut facts, body, stream } = decode(endpoint, id, body, bounds)?;
    facts.accepted_ms = lane.clock.at_ms(at);
    facts.session_key = session_key;
    let request_id: Arc<str> = facts.id.as_str().into();
    lane.meters.decode.record(begun.elapsed());

    notes.model = lane.roster.snapshot().fleet().models().get(&facts.model).cloned();
    let pinned = lane.routing.pin();
    let mut ask = GenerateRequest { endpoint, body, stream, request_id };
    let mut failure = None;
    for attempt in 0..MAX_PLACINGS {
        facts.attempt = attempt;
        facts.decision_id = lane.decisions.fetch_add(1, Relaxed);
        let placing = match place(lane, &pinned, &facts, notes).await {
            Ok(placing) => placing,
            // Every worker has failed it: what the last one failed with says more than "no worker".
            Err(error) => return Err(failure.unwrap_or(error)),
        };
        if attempt == 0 {
            lane.meters.dispatch.record(begun.elapsed());
        }
        match dispatch(lane, &placing, &mut facts, &mut ask, at).await {
            Ok(response) => return Ok(response),
            Err(error) => failure = Some(error.into()),
        }
    }
    Err(failure.expect("a request is placed at least once"))
}

/// Rows to try, best first, and who ranked them.
struct Placing {
    snapshot: Arc<Snapshot>,
    candidates: Arc<Candidates>,
    rows: Vec<u32>,
    by: DecidedBy,
    /// `x-dynamo-policy`.
    policy: String,
}

/// Asks the policy where the request shall go, again and again while it holds it.
async fn place(lane: &Lane, pinned: &Pinned, facts: &RequestFacts, notes: &mut Notes) -> Result<Placing, RequestError> {
    let request = Arc::new(facts.clone());
    let mut changes = lane.roster.changes();
    for holds in 0..=MAX_HOLDS {
        let begun = Instant::now();
        let snapshot = lane.roster.snapshot();
        let candidates = snapshot.candidates(facts)?;
        let call = RouteCall {
            request: Arc::clone(&request),
            candidates: Arc::clone(&candidates),
            now_ms: lane.clock.now_ms(),
            unix_ms: unix_ms(),
            seed: facts.decision_id,
            explain: false,
        };
        let decision = if holds < MAX_HOLDS {
            lane.routing.decide(pinned, call)
        } else {
            let detail = format!("it held the request {MAX_HOLDS} times");
            lane.routing.decide_instead_of(pinned, &call, &PolicyFault { cause: FaultCause::HoldExhausted, detail })
        };
        lane.meters.route.record(begun.elapsed());
        let Decision { verdict, by, .. } = decision;
        let policy = decided_by(&by, pinned);
        notes.policy = Some(policy.clone());
        match verdict {
            Verdict::Place(ranking) => {
                let rows = ranking.rows().to_vec();
                return Ok(Placing { snapshot, candidates, rows, by, policy });
            }
            Verdict::Reject(rejection) => return Err(RequestError::Rejected(rejection)),
            Verdict::Hold { at_most_ms } => {
                let pause = Duration::from_millis(u64::from(at_most_ms)).min(MAX_HOLD);
                let _ = tokio::time::timeout(pause, changes.changed()).await;
            }
        }
    }
    unreachable!("the native fallback never holds")
}

/// Sends the request to the first worker of the ranking that takes it.
async fn dispatch(
    lane: &Lane,
    placing: &Placing,
    facts: &mut RequestFacts,
    ask: &mut GenerateRequest,
    at: Instant,
) -> Result<Response, EngineError> {
    let mut failure = None;
    for (left, &row) in (0..placing.rows.len()).rev().zip(&placing.rows) {
        let worker = placing.candidates.worker(row);
        metrics::counter!("dynamo_host_worker_requests_total", "worker" => worker.spec.name.clone()).increment(1);
        let account = Account::open(lane, facts, worker, observed_version(placing), at);
        let head = Head {
            policy: placing.policy.clone(),
            worker: lane.expose_worker.then(|| worker.spec.name.clone()),
            request_id: Arc::clone(&ask.request_id),
        };
        tracing::debug!(worker = worker.spec.name, policy = head.policy, "dispatch");
        let answer = match placing.snapshot.engine(worker.id).generate(ask.clone()).await {
            Ok(Reply::Whole(reply)) if left > 0 && is_busy(reply.status) => {
                let reason = format!("it answered {}", reply.status);
                Err((account, EngineError::Unhealthy { engine: worker.spec.name.clone(), reason }))
            }
            Ok(Reply::Whole(reply)) => Ok(relay::whole(account, head, reply)),
            Ok(Reply::Stream(stream)) => relay::stream(account, head, stream, lane.limits.stream_idle()).await,
            Err(error) => Err((account, error)),
        };
        match answer {
            Ok(response) => return Ok(response),
            Err((account, error)) => {
                account.abandon();
                metrics::counter!("dynamo_host_retries_total", "cause" => error.label()).increment(1);
                tracing::warn!(worker = worker.spec.name, "worker failed before its first token: {error}");
                if matches!(error, EngineError::Connect { .. }) {
                    lane.roster.report_unreachable(&worker.spec, &error);
                }
                facts.failed_workers.push(worker.id);
                // A request that took its whole time is not worth as much again.
                if matches!(error, EngineError::Timeout { .. }) {
                    return Err(error);
                }
                failure = Some(error);
            }
        }
    }
    Err(failure.expect("a ranking has at least one row"))
}

/// The version that learns what becomes of the request.
fn observed_version(placing: &Placing) -> Option<Arc<dynamo_host_policy::PolicyVersion>> {
    match &placing.by {
        DecidedBy::Policy(version) if version.observes() => Some(Arc::clone(version)),
        _ => None,
    }
}

/// `x-dynamo-policy`.
fn decided_by(by: &DecidedBy, pinned: &Pinned) -> String {
    match (by, &pinned.0) {
        (DecidedBy::Policy(version), _) => version.label().to_string(),
        (DecidedBy::Native(Some(cause)), Some(version)) => format!("native; fallback={cause}; policy={}", version.label()),
        (DecidedBy::Native(_), _) => dynamo_host_core::native::NAME.to_owned(),
    }
}

/// Whether an engine says that another one would be a better choice.
fn is_busy(status: StatusCode) -> bool {
    matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY)
}

/// Collects a body up to its bound. One that is larger is read on for a while all the same: a client that is still
/// writing when the connection closes sees a reset, not the answer.
async fn read_body(mut body: Body, limits: &Limits) -> Result<Bytes, RequestError> {
    let max_bytes = limits.max_body_bytes;
    let declared = axum::body::HttpBody::size_hint(&body).lower();
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
