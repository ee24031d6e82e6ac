//! Fetch: KV over HTTP, from the engine that computed it to the one that goes on.
//!
//! Who has it answers at once, and its answer ends when all has been moved; a connection that ends before is KV that did not
//! come. Who fetches gives up on an engine that says nothing for [`SILENCE`], which is what NIXL takes to find that nobody answers.

use std::{future::pending, io, sync::Arc, sync::atomic::Ordering::Relaxed, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header::HOST};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpStream,
    sync::oneshot,
    time::{Instant, error::Elapsed, timeout},
};

use super::{Handoff, Remote};
use crate::{
    driver::Ticket,
    faults::{FetchFailed, FetchMoment, Target},
    model::Fetch,
};

/// Where KV is fetched.
pub(crate) const PATH: &str = "/mock/kv";
/// Longest wait for a connection, and for the beginning of an answer.
const SILENCE: Duration = Duration::from_secs(5);
/// Longest time that a fetch takes, however slow the ports.
const LONGEST: Duration = Duration::from_secs(60);

/// What is fetched, as it is asked for.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Parcel {
    engine_id: String,
    request_id: String,
    /// Tokens at the end of the prompt.
    tokens: u32,
    /// Tokens of the prompt, and which.
    prompt_tokens: u32,
    digest: u64,
}

/// Why nothing is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusedFetch {
    /// It is not kept: it never was, by this run of the engine, or not any more.
    NotKept,
    /// It is of another prompt.
    Mismatch,
}

/// A request that waits for KV.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) ticket: Ticket,
    pub(crate) remote: Remote,
    pub(crate) prompt_tokens: u32,
    pub(crate) digest: u64,
    /// Says when its blocks are there.
    pub(crate) told: oneshot::Receiver<Fetch>,
}

/// Why KV did not come.
#[derive(Debug, thiserror::Error)]
enum NotFetched {
    #[error("it is of another prompt")]
    Mismatch,
    #[error("the other engine answers {0}")]
    Refused(StatusCode),
    #[error(transparent)]
    Silent(#[from] Elapsed),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Http(#[from] hyper::Error),
}

impl Handoff {
    /// Fetches what a request waits for, when its blocks are there.
    pub(crate) async fn fetch(self: Arc<Self>, wanted: Wanted) -> Result<(), FetchFailed> {
        let Wanted { ticket, remote, prompt_tokens, digest, told } = wanted;
        let Remote { engine_id, request_id, host, port, .. } = remote;
        // Whoever drives the engine is gone: the outputs say so.
        let Ok(Fetch { tokens, .. }) = told.await else { return Ok(()) };
        let parcel = Parcel { engine_id, request_id, tokens, prompt_tokens, digest };
        match self.bring(&host, port, &parcel).await {
            Ok(()) => self.courier.fetched(ticket, true).await,
            Err(NotFetched::Mismatch) => return Err(self.mismatch()),
            Err(_) => {
                self.failed.fetch_add(1, Relaxed);
                if !self.options.recomputes {
                    return Err(FetchFailed);
                }
                self.courier.fetched(ticket, false).await;
            }
        }
        Ok(())
    }

    /// The KV is of another prompt.
    pub(crate) fn mismatch(&self) -> FetchFailed {
        self.failed.fetch_add(1, Relaxed);
        if self.options.dies_of_mismatch {
            self.switches.die();
        }
        FetchFailed
    }

    async fn bring(&self, host: &str, port: u16, parcel: &Parcel) -> Result<(), NotFetched> {
        let bytes = self.profile.kv_bytes(parcel.tokens);
        let strike = self.switches.strike(Target::Fetch);
        self.die_at(strike.faults().and_then(|faults| faults.fetch_die), async || self.into.transfer(bytes / 2).await).await;
        let moved = async {
            self.into.transfer(bytes).await;
            Ok(())
        };
        tokio::try_join!(ask(host, port, parcel), moved).map(drop)
    }

    /// Begins to send what is kept; it is freed when all of it was.
    pub(crate) fn send(
        self: &Arc<Self>,
        parcel: &Parcel,
    ) -> Result<impl Future<Output = io::Result<Bytes>> + Send + use<>, RefusedFetch> {
        if parcel.engine_id != self.engine_id {
            return Err(RefusedFetch::NotKept);
        }
        let lease = self.leases.begin(&parcel.request_id).ok_or(RefusedFetch::NotKept)?;
        let sending = Sending { handoff: Arc::clone(self), request_id: parcel.request_id.clone(), arrived: false };
        if (parcel.prompt_tokens, parcel.digest) != (lease.tokens, lease.digest) || parcel.tokens > lease.tokens {
            return Err(RefusedFetch::Mismatch);
        }
        Ok(sending.carry_out(self.profile.kv_bytes(parcel.tokens)))
    }

    /// Dies, if that is due. It does not come back then.
    async fn die_at(&self, moment: Option<FetchMoment>, half: impl AsyncFnOnce()) {
        let Some(moment) = moment else { return };
        if moment == FetchMoment::Within {
            half().await;
        }
        self.switches.die();
        pending::<()>().await;
    }
}

/// KV on its way.
struct Sending {
    handoff: Arc<Handoff>,
    request_id: String,
    arrived: bool,
}

impl Sending {
    async fn carry_out(mut self, bytes: u64) -> io::Result<Bytes> {
        let handoff = Arc::clone(&self.handoff);
        let strike = handoff.switches.strike(Target::Fetch);
        if let Some(faults) = strike.faults() {
            handoff.die_at(faults.fetch_die, async || handoff.out.transfer(bytes / 2).await).await;
            if faults.fetch_cut {
                handoff.out.transfer(bytes / 2).await;
                return Err(io::ErrorKind::ConnectionReset.into());
            }
        }
        handoff.out.transfer(bytes).await;
        self.arrived = true;
        Ok(Bytes::from_static(b"{}"))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if let Some(ticket) = self.handoff.leases.end(Instant::now(), &self.request_id, self.arrived) {
            self.handoff.courier.release(ticket);
        }
    }
}

/// Asks for KV, and waits for all of it.
async fn ask(host: &str, port: u16, parcel: &Parcel) -> Result<(), NotFetched> {
    let socket = timeout(SILENCE, TcpStream::connect((host, port))).await??;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(socket)).await?;
    let exchange = async move {
        let body = serde_json::to_vec(parcel).expect("numbers and strings serialize");
        let mut request = Request::new(Full::new(Bytes::from(body)));
        (*request.method_mut(), *request.uri_mut()) = (Method::POST, PATH.parse().expect("it is a path"));
        request.headers_mut().insert(HOST, http::HeaderValue::from_static("mock"));
        let response = timeout(SILENCE, sender.send_request(request)).await??;
        match response.status() {
            StatusCode::OK => {
                timeout(LONGEST, response.into_body().collect()).await??;
                Ok(())
            }
            StatusCode::CONFLICT => Err(NotFetched::Mismatch),
            status => Err(NotFetched::Refused(status)),
        }
    };
    // The connection ends with the exchange, which has its other half.
    let (exchanged, _) = tokio::join!(exchange, connection);
    exchanged
}
