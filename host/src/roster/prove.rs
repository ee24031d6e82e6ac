//! Proof that engines can hand KV over: a tiny request whose prompt one computes and whose output another makes, before they are
//! given anybody's.
//!
//! An engine that was started without its connector says so only when it is asked, some of them in their settings alone, and a prompt
//! that two engines tokenize differently can end the one that decodes. So a worker has no part in hand-offs until one with a
//! counterpart went well: after it came, and after each time that it was away. Which of two is at fault is judged by where it went wrong, and by which of them is
//! proven already. Who fails is tried again, after pauses that double: so it comes back by itself.
//!
//! It is off the request path, bounded in time and number, and no request of anybody's: no policy, account or metric of requests
//! knows it.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use dynamo_engine_api::{Endpoint, Engine, EngineError, GenerateRequest, Leg, Prefilled, Reply, Ticket, WholeReply};
use dynamo_host_core::{Role, Worker, WorkerId, WorkerState, id};
use http::StatusCode;
use serde_json::json;
use tokio::task::JoinSet;

use super::{Member, Roster, canary::PRIORITY, handoff::Fit};
use crate::text::plain;

/// Checks at once.
const CHECKS: usize = 8;
/// How often is looked whose pause is over.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a hand-off may take: the first one between two engines connects them.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to say the tokens of a text.
const TOKENIZE_PATIENCE: Duration = Duration::from_secs(5);
/// How long after its answer an engine may take to say that it has fetched KV, and how often it is asked.
const FETCH_PATIENCE: Duration = Duration::from_secs(2);
const FETCH_LOOK_EVERY: Duration = Duration::from_millis(100);
/// The pause after a failure, at first and at most.
const PAUSE_MS: [u64; 2] = [500, 60_000];
/// Words of a prompt by which it is longer than a block; without a known block, it is so many blocks of the usual size.
const WORDS_BEYOND: u32 = 16;
const USUAL_BLOCK: u32 = 64;
const MAX_WORDS: u32 = 4096;
/// What different tokenizers cut differently.
const TEXT: &str = "The 3 quick_brown foxes' naïve café, ~12,345.67e-8 «да» 漢字かな 👩‍🚀\n\tfn main() { println!(\"0x1F\"); }";

/// What was seen of a worker's hand-offs.
#[derive(Clone, Debug, Default)]
pub(super) struct Proof {
    pub(super) is_proven: bool,
    /// Why it was refused, until it is tried again.
    pub(super) refused: Option<String>,
    tries: u32,
    again_ms: u64,
}

impl Proof {
    fn proven() -> Self {
        Self { is_proven: true, ..Self::default() }
    }

    /// Whether nothing was tried yet.
    pub(super) fn is_new(&self) -> bool {
        !self.is_proven && self.tries == 0
    }

    /// It did not go well.
    fn later(&mut self, now_ms: u64) {
        let [first, most] = PAUSE_MS;
        self.again_ms = now_ms + (first << self.tries.min(16)).min(most);
        self.tries += 1;
        self.is_proven = false;
    }

    /// Whether it is this one's turn to be tried.
    fn is_due(&self, now_ms: u64) -> bool {
        !self.is_proven && now_ms >= self.again_ms
    }
}

/// One end of a hand-off: an engine that is well, and its first worker that fits others.
#[derive(Clone)]
struct End {
    member: Arc<Member>,
    worker: Worker,
    rank: Option<u32>,
    key: u64,
    proof: Proof,
}

/// Why a hand-off did not go well.
#[derive(Debug)]
enum Fault {
    /// The engine that prefills did not do its part.
    Prefill(String),
    /// The one that decodes.
    Decode(String),
    /// Nobody can tell.
    Untold(String),
}

/// Proves whoever is to be proven, until the task is ended.
pub(super) async fn keep_proving(roster: Arc<Roster>) {
    let mut checks: JoinSet<Vec<String>> = JoinSet::new();
    // Those that a check is about. One that is proven may help with several.
    let mut busy: HashSet<String> = HashSet::new();
    loop {
        if roster.has_roles() && roster.health().check_handoffs {
            roster.begin_checks(&mut checks, &mut busy);
        }
        tokio::select! {
            Some(done) = checks.join_next(), if !checks.is_empty() => match done {
                Ok(names) => busy.retain(|name| !names.contains(name)),
                // A check that panicked has said so; whom it was about is not known, so that all may be tried again.
                Err(_) => busy.clear(),
            },
            () = roster.prove_soon.notified() => {}
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

impl Roster {
    fn begin_checks(self: &Arc<Self>, checks: &mut JoinSet<Vec<String>>, busy: &mut HashSet<String>) {
        let now_ms = self.clock.now_ms();
        let members: Vec<Arc<Member>> = self.members().values().cloned().collect();
        let ends: Vec<End> = members.iter().filter_map(end).collect();
        for subject in ends.iter().filter(|end| end.proof.is_due(now_ms)) {
            if checks.len() >= CHECKS {
                return;
            }
            let Some(other) = counterpart(subject, &ends) else { continue };
            let about = [subject, other].into_iter().filter(|end| !end.proof.is_proven);
            let about: Vec<String> = about.map(|end| end.member.config.name.clone()).collect();
            if about.iter().any(|name| busy.contains(name)) {
                continue;
            }
            busy.extend(about.iter().cloned());
            let prefills = subject.worker.spec.role.prefills() && other.worker.spec.role.decodes();
            let (prefill, decode) = if prefills { (subject, other) } else { (other, subject) };
            let (roster, prefill, decode) = (Arc::clone(self), prefill.clone(), decode.clone());
            checks.spawn(async move {
                roster.check(&prefill, &decode).await;
                about
            });
        }
    }

    /// Has one engine prefill what another decodes, and takes down what came of it.
    async fn check(&self, prefill: &End, decode: &End) {
        for end in [prefill, decode] {
            end.learn_tokens().await;
        }
        let [one, other] = [prefill, decode].map(|end| end.member.standing().tokens);
        let have_other_tokens = one.zip(other).is_some_and(|(one, other)| one != other);
        let (one, other) = (prefill.block_size().await, decode.block_size().await);
        let have_other_blocks = one.zip(other).is_some_and(|(one, other)| one != other);
        if have_other_tokens || have_other_blocks {
            // They fit each other no more, which is said when it is published, or when their load has been read.
            for end in [prefill, decode] {
                let mut standing = end.member.standing();
                if !standing.proof.is_proven {
                    standing.proof.later(self.clock.now_ms());
                }
            }
            return self.publish_soon();
        }
        if self.refuse_without_part([prefill, decode]).await {
            return self.publish_soon();
        }
        let begun = Instant::now();
        let checked = tokio::time::timeout(PATIENCE, hand_over_seen(prefill, decode)).await;
        let checked =
            checked.unwrap_or_else(|_| Err(Fault::Untold(format!("nothing came of it within {} s", PATIENCE.as_secs()))));
        let result = match &checked {
            Ok(()) => "ok",
            Err(Fault::Prefill(_)) => "prefill",
            Err(Fault::Decode(_)) => "decode",
            Err(Fault::Untold(_)) => "untold",
        };
        metrics::counter!("dynamo_host_handoff_checks_total", "result" => result).increment(1);
        let [from, to] = [prefill, decode].map(|end| end.member.config.name.as_str());
        match checked {
            Ok(()) => {
                tracing::info!(prefill = from, decode = to, ms = begun.elapsed().as_millis() as u64, "workers can hand KV over");
                for end in [prefill, decode] {
                    end.member.standing().proof = Proof::proven();
                }
            }
            Err(fault) => self.blame(prefill, decode, fault),
        }
        self.publish_soon();
    }

    /// Refuses those of two who say that they were started for no part in hand-offs. Whether there was one.
    async fn refuse_without_part(&self, ends: [&End; 2]) -> bool {
        let reasons = [ends[0].no_part().await, ends[1].no_part().await];
        if reasons.iter().all(Option::is_none) {
            return false;
        }
        for ((end, reason), part) in ends.into_iter().zip(reasons).zip(["prefill", "decode"]) {
            let mut standing = end.member.standing();
            if reason.is_some() || !standing.proof.is_proven {
                standing.proof.later(self.clock.now_ms());
            }
            if let Some(reason) = reason {
                metrics::counter!("dynamo_host_handoff_checks_total", "result" => part).increment(1);
                refuse(&end.member.config.name, &mut standing.proof, reason);
            }
        }
        true
    }

    /// Takes down a hand-off that did not go well: at the cost of who is at fault, and never of who is proven.
    fn blame(&self, prefill: &End, decode: &End, fault: Fault) {
        let now_ms = self.clock.now_ms();
        let [from, to] = [prefill, decode].map(|end| &end.member.config.name);
        let is_proven = |end: &End| end.member.standing().proof.is_proven;
        let (guilty, reason) = match fault {
            Fault::Prefill(reason) => (prefill, format!("it cannot prefill for {to}: {reason}")),
            Fault::Decode(reason) if is_proven(decode) => {
                (prefill, format!("{to}, which decodes what others prefill, cannot decode what this one does: {reason}"))
            }
            Fault::Decode(reason) => (decode, format!("it cannot decode what {from} prefilled: {reason}")),
            Fault::Untold(reason) => {
                tracing::debug!(prefill = from, decode = to, "a hand-off could not be checked: {reason}");
                (if is_proven(prefill) { decode } else { prefill }, format!("a hand-off from {from} to {to} was tried: {reason}"))
            }
        };
        for end in [prefill, decode].into_iter().filter(|end| !is_proven(end)) {
            let mut standing = end.member.standing();
            standing.proof.later(now_ms);
            if std::ptr::eq(end, guilty) {
                refuse(end.member.config.name.as_str(), &mut standing.proof, reason.clone());
            }
        }
    }

    /// A request's prefill on a worker came to nothing that anybody could go on from: it gets no more of them until a check went
    /// well. Nothing happens to another engine that has its place by now.
    pub(crate) fn report_no_handoff(&self, worker: WorkerId, engine: &Arc<dyn Engine>, error: &EngineError) {
        let snapshot = self.snapshot();
        let Some(seat) = snapshot.find(worker).filter(|seat| Arc::ptr_eq(&seat.member.engine, engine)) else { return };
        {
            let mut standing = seat.member.standing();
            if !standing.proof.is_proven {
                return;
            }
            standing.proof.later(self.clock.now_ms());
            let reason = plain(&format!("its prefill was of no use to others: {error}"));
            refuse(&seat.member.config.name, &mut standing.proof, reason);
        }
        self.publish_soon();
    }

    /// Has an engine whose split workers serve no whole requests show that it works, by a hand-off with one that is proven.
    /// `None`: nobody is there to do it with, or it was not its doing.
    pub(super) async fn hand_over_with(&self, member: &Arc<Member>) -> Option<Result<(), String>> {
        let members: Vec<Arc<Member>> = self.members().values().cloned().collect();
        let ends: Vec<End> = members.iter().filter_map(end).collect();
        let subject = ends.iter().find(|end| Arc::ptr_eq(&end.member, member))?;
        let other = counterpart(subject, &ends).filter(|other| other.proof.is_proven)?;
        let prefills = subject.worker.spec.role.prefills();
        let (prefill, decode) = if prefills { (subject, other) } else { (other, subject) };
        match tokio::time::timeout(self.health().canary_timeout(), hand_over(prefill, decode)).await {
            Ok(Ok(())) => Some(Ok(())),
            Ok(Err(Fault::Prefill(reason))) if prefills => Some(Err(reason)),
            Ok(Err(Fault::Decode(reason))) if !prefills => Some(Err(reason)),
            _ => None,
        }
    }
}

/// Says why a worker has no part in hand-offs, once.
fn refuse(name: &str, proof: &mut Proof, reason: String) {
    if proof.refused.as_ref() != Some(&reason) {
        tracing::warn!(worker = name, "worker gets no hand-offs: {reason}");
        proof.refused = Some(reason);
    }
}

/// An engine as an end of hand-offs, if it is well and fits others.
fn end(member: &Arc<Member>) -> Option<End> {
    if member.config.role == Role::Aggregated {
        return None;
    }
    let standing = member.standing();
    if standing.state() != WorkerState::Healthy {
        return None;
    }
    let (worker, key) = standing.workers.iter().zip(&standing.fits).find_map(|(worker, fit)| match fit {
        Fit::With(key) => Some((worker.clone(), *key)),
        _ => None,
    })?;
    let rank = standing.has_ranks.then_some(worker.spec.rank);
    Some(End { member: Arc::clone(member), worker, rank, key, proof: standing.proof.clone() })
}

/// Whom to try it with: one that is proven, else one that is not refused, else anybody, in turn.
fn counterpart<'a>(subject: &End, ends: &'a [End]) -> Option<&'a End> {
    let role = subject.worker.spec.role;
    let others = ends.iter().filter(|other| {
        let theirs = other.worker.spec.role;
        let is_other = !Arc::ptr_eq(&other.member, &subject.member) && other.key == subject.key;
        is_other && ((role.prefills() && theirs.decodes()) || (role.decodes() && theirs.prefills()))
    });
    let class = |end: &End| (!end.proof.is_proven, end.proof.refused.is_some());
    let others: Vec<&End> = others.collect();
    let best = others.iter().map(|end| class(end)).min()?;
    let best: Vec<&End> = others.into_iter().filter(|end| class(end) == best).collect();
    best.get(subject.proof.tries as usize % best.len()).copied()
}

impl End {
    fn engine(&self) -> &dyn Engine {
        &*self.member.engine
    }

    /// Asks the engine for the tokens of a text, unless it has said them.
    async fn learn_tokens(&self) {
        if self.member.standing().tokens.is_some() {
            return;
        }
        let body = Bytes::from(json!({ "model": self.worker.spec.model, "prompt": TEXT }).to_string());
        let asked = self.engine().tokenize(Endpoint::Completions, body);
        if let Ok(Ok(Some(ids))) = tokio::time::timeout(TOKENIZE_PATIENCE, asked).await {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            self.member.standing().tokens = Some(id::key(&bytes));
        }
    }

    /// Tokens of its KV blocks, if anybody says; its load may not have been read yet.
    async fn block_size(&self) -> Option<u32> {
        let known = self.worker.block_size();
        if known.is_some() {
            return known;
        }
        let loads = tokio::time::timeout(TOKENIZE_PATIENCE, self.engine().load()).await.ok()?.ok()?;
        loads.iter().find_map(|load| load.block_size)
    }

    /// Why it can have no part in hand-offs, if it says so.
    async fn no_part(&self) -> Option<String> {
        tokio::time::timeout(TOKENIZE_PATIENCE, self.engine().no_part()).await.ok().flatten()
    }

    /// Prompt tokens whose KV it has ever fetched, if it says.
    async fn fetched_tokens(&self) -> Option<u64> {
        let loads = tokio::time::timeout(TOKENIZE_PATIENCE, self.engine().load()).await.ok()?.ok()?;
        loads.iter().filter_map(|load| load.fetched_tokens).reduce(|all, of_rank| all + of_rank)
    }

    /// A request whose prompt nobody has had before, and that is longer than a block.
    fn ask(&self, prompt: &str) -> GenerateRequest {
        let model = &self.worker.spec.model;
        let body = json!({ "model": model, "prompt": prompt, "max_tokens": 2, "ignore_eos": true, "temperature": 0 });
        let ask = GenerateRequest::new(Endpoint::Completions, Bytes::from(body.to_string()), false, "handoff-check".into());
        GenerateRequest { rank: self.rank, priority: PRIORITY, ..ask }
    }
}

/// A prompt that nobody has had before, longer than a block.
fn prompt(prefill: &End) -> String {
    let words = (prefill.worker.block_size().unwrap_or(USUAL_BLOCK) + WORDS_BEYOND).min(MAX_WORDS);
    let nonce = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0u8);
    (0..words).map(|word| (nonce % 1000 + u64::from(word) * (nonce % 7 + 1)).to_string()).collect::<Vec<_>>().join(" ")
}

/// Hands a tiny request over, and looks whether its KV was fetched, where the engine that decodes tells.
async fn hand_over_seen(prefill: &End, decode: &End) -> Result<(), Fault> {
    let before = decode.fetched_tokens().await;
    hand_over(prefill, decode).await?;
    let Some(before) = before else { return Ok(()) };
    let until = Instant::now() + FETCH_PATIENCE;
    // Its metrics may come after its answer.
    while decode.fetched_tokens().await.is_some_and(|now| now <= before) {
        if Instant::now() >= until {
            let reason = "it answered, and computed the prompt itself; start it with its KV connector, such as vLLM's \
                          --kv-transfer-config";
            return Err(Fault::Decode(reason.to_owned()));
        }
        tokio::time::sleep(FETCH_LOOK_EVERY).await;
    }
    Ok(())
}

/// Hands a tiny request over.
async fn hand_over(prefill: &End, decode: &End) -> Result<(), Fault> {
    let prompt = prompt(prefill);
    let Some(protocol) = prefill.engine().handoff() else {
        return Err(Fault::Untold("it does not say how it hands KV over any more".to_owned()));
    };
    if protocol.is_concurrent() {
        let ticket = prefill.engine().ticket(prefill.rank).await.map_err(|error| Fault::Prefill(plain(&error.to_string())))?;
        let ask = GenerateRequest { leg: Leg::Prefill(Some(ticket.clone())), ..prefill.ask(&prompt) };
        let (first, second) = tokio::join!(answer(prefill, ask), decoded(decode, &prompt, ticket));
        first.map_err(|failed| failed.at(Fault::Prefill))?;
        return second;
    }
    let ask = GenerateRequest { leg: Leg::Prefill(None), ..prefill.ask(&prompt) };
    let reply = answer(prefill, ask).await.map_err(|failed| failed.at(Fault::Prefill))?;
    match prefill.engine().prefilled(&reply) {
        Ok(Prefilled::Ready(ticket)) => decoded(decode, &prompt, ticket).await,
        Ok(Prefilled::Final) => Err(Fault::Untold("its first token was its last".to_owned())),
        Err(error) => Err(Fault::Prefill(plain(&error.to_string()))),
    }
}

async fn decoded(decode: &End, prompt: &str, ticket: Ticket) -> Result<(), Fault> {
    let ask = GenerateRequest { leg: Leg::Decode(ticket), ..decode.ask(prompt) };
    let answered = answer(decode, ask.clone()).await;
    if answered.is_err() {
        // Nobody shall keep for long what was not fetched.
        let _ = tokio::time::timeout(TOKENIZE_PATIENCE, decode.engine().release(ask)).await;
    }
    answered.map(drop).map_err(|failed| failed.at(Fault::Decode))
}

/// A part that was not done.
struct Failed {
    reason: String,
    /// It says nothing of whether the engine can do it.
    is_untold: bool,
}

impl Failed {
    fn at(self, fault: fn(String) -> Fault) -> Fault {
        if self.is_untold { Fault::Untold(self.reason) } else { fault(self.reason) }
    }
}

/// Asks one engine for its part.
async fn answer(end: &End, ask: GenerateRequest) -> Result<WholeReply, Failed> {
    match end.engine().generate(ask).await {
        Ok(Reply::Whole(reply)) if reply.status.is_success() => Ok(reply),
        Ok(Reply::Whole(reply)) => {
            let is_untold = matches!(reply.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
            let said = plain(&String::from_utf8_lossy(&reply.body));
            Err(Failed { reason: format!("{} answered {}: {said}", end.member.config.name, reply.status), is_untold })
        }
        Ok(Reply::Stream(_)) => {
            Err(Failed { reason: "it was asked for no stream, and answered with one".to_owned(), is_untold: false })
        }
        Err(error) => {
            let is_untold =
                matches!(error, EngineError::Connect { .. } | EngineError::Timeout { .. } | EngineError::Broken { .. });
            Err(Failed { reason: plain(&error.to_string()), is_untold })
        }
    }
}

#[cfg(test)]
mod tests;
