//! The question of the world `router`: where does a request go?

use std::sync::Arc;

use dynamo_host_core::{
    Candidates, LinkBoard, Overlap, Rejection, RequestFacts,
    answer::{self, MAX_HOLDS, Ranking, Verdict},
    column::U32Column,
    native,
};

use super::Question;
use crate::{
    call::{Guest, Reading, Subject},
    fault::{FaultCause, PolicyFault},
    runtime::Now,
    synthetic::{self, SyntheticFleet},
    version::PolicyVersion,
    world::{ROUTER, World},
};

/// Everything that a routing decision reads. It holds no prompt text.
#[derive(Clone, Debug)]
pub struct RouteCall {
    /// Facts of the request.
    pub request: Arc<RequestFacts>,
    /// The workers that may serve it.
    pub candidates: Arc<Candidates>,
    /// What workers hold of its prompt's prefix; `None` if nobody has looked.
    pub overlap: Option<Arc<Overlap>>,
    /// What is known of the ways between them; `None` if KV is not handed over.
    pub links: Option<Arc<LinkBoard>>,
    /// The host's monotonic clock.
    pub now_ms: u64,
    /// Wall clock.
    pub unix_ms: u64,
    /// Seed of the decision's randomness.
    pub seed: u64,
    /// Whether what the policy reads, and its reasons, are recorded.
    pub explain: bool,
}

/// What the native fallback decides, and what it reads for it if that is asked for.
#[must_use]
pub fn native_route(call: &RouteCall) -> (Ranking, Vec<Reading>) {
    let read = |column: U32Column| call.candidates.u32_column(column, call.now_ms);
    let columns = native::READS.map(read);
    let roles = native::reads_roles(&call.candidates, call.request.stage).then(|| read(U32Column::Role));
    let ranking = native::rank(&columns[0], &columns[1], roles.as_deref(), call.seed);
    if !call.explain {
        return (ranking, Vec::new());
    }
    let readings = native::READS.into_iter().zip(columns).chain(roles.map(|roles| (U32Column::Role, roles)));
    (ranking, readings.map(|(column, values)| Reading::Column(column.name(), values.into())).collect())
}

impl Question for RouteCall {
    type Verdict = Verdict;
    type Scene = SyntheticFleet;

    const WORLD: &'static World = &ROUTER;

    fn request(&self) -> &RequestFacts {
        &self.request
    }

    fn now(&self) -> Now {
        Now { monotonic_ms: self.now_ms, unix_ms: self.unix_ms }
    }

    fn seed(&self) -> u64 {
        self.seed
    }

    fn set_seed(&mut self, seed: u64) {
        self.seed = seed;
    }

    fn rows(&self) -> u32 {
        self.candidates.count()
    }

    fn native(&self) -> (Verdict, Vec<Reading>) {
        let (ranking, readings) = native_route(self);
        (Verdict::Place(ranking), readings)
    }

    fn refusal(rejection: Rejection) -> Verdict {
        Verdict::Reject(rejection)
    }

    fn is_put_off(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Hold { .. })
    }

    fn out_of_turns(&self) -> Option<PolicyFault> {
        (self.request.holds >= MAX_HOLDS).then(|| {
            let detail = format!("it held the request {MAX_HOLDS} times");
            PolicyFault { cause: FaultCause::HoldExhausted, detail }
        })
    }

    fn into_subject(self) -> Subject {
        Subject::Route(self)
    }

    fn verdict(guest: &mut Guest, rows: u32) -> Result<Verdict, PolicyFault> {
        let answer = guest.routing.take();
        let call = guest.route("route").map_err(|error| PolicyFault::of(&error, None))?;
        let role = |row| call.candidates.worker(row).spec.role;
        Ok(answer::validate(answer, call.request.stage, rows, role)?)
    }

    fn scene(rows: u32) -> SyntheticFleet {
        synthetic::fleet(rows)
    }

    fn scenes(version: &PolicyVersion, rows: u32) -> Vec<SyntheticFleet> {
        let scenes: &[fn(u32) -> SyntheticFleet] = match version.tells_roles_apart() {
            true => &[synthetic::fleet, synthetic::split, synthetic::decoding],
            false => &[synthetic::fleet],
        };
        scenes.iter().map(|scene| scene(rows)).collect()
    }

    fn measured(version: &PolicyVersion, rows: u32) -> SyntheticFleet {
        if version.tells_roles_apart() { synthetic::split(rows) } else { synthetic::fleet(rows) }
    }

    fn plain(fleet: &SyntheticFleet, seed: u64, explain: bool) -> Self {
        Self { explain, ..synthetic::route_call(fleet, seed) }
    }

    fn nth(fleet: &SyntheticFleet, nth: u64) -> Self {
        let mut call = synthetic::route_call(fleet, nth + 1);
        synthetic::vary(Arc::make_mut(&mut call.request), nth);
        call.now_ms += nth * 10;
        call.unix_ms += nth * 10;
        call
    }
}
