//! The question of the world `admission`: is a request let in, and where does it stand among those that wait?

use std::sync::Arc;

use dynamo_host_core::{
    Admitted, PoolState, Rejection, RequestFacts,
    admission::{self, Verdict},
};

use super::Question;
use crate::{
    call::{Guest, Reading, Subject},
    fault::PolicyFault,
    runtime::Now,
    synthetic,
    world::{ADMISSION, World},
};

/// Everything that an admission decision reads. It holds no prompt text.
#[derive(Clone, Debug)]
pub struct AdmissionCall {
    /// Facts of the request.
    pub request: Arc<RequestFacts>,
    /// The pools that could serve it; the one that it would go to first is the first. At least one.
    pub pools: Arc<[PoolState]>,
    /// Where the request stands if no policy says otherwise.
    pub native: Admitted,
    /// The host's monotonic clock.
    pub now_ms: u64,
    /// Wall clock.
    pub unix_ms: u64,
    /// Seed of the decision's randomness.
    pub seed: u64,
}

impl Question for AdmissionCall {
    type Verdict = Verdict;
    type Scene = Arc<[PoolState]>;

    const WORLD: &'static World = &ADMISSION;

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
        self.pools.len() as u32
    }

    /// Everything is let in; the queue's own bound is what limits it.
    fn native(&self) -> (Verdict, Vec<Reading>) {
        (Verdict::Admit(self.native.clone()), Vec::new())
    }

    fn refusal(rejection: Rejection) -> Verdict {
        Verdict::Shed(rejection)
    }

    fn into_subject(self) -> Subject {
        Subject::Admit(self)
    }

    fn verdict(guest: &mut Guest, _rows: u32) -> Result<Verdict, PolicyFault> {
        Ok(admission::validate(guest.admission.take(), std::mem::take(&mut guest.admitted))?)
    }

    fn scene(rows: u32) -> Arc<[PoolState]> {
        synthetic::pools(rows)
    }

    fn plain(pools: &Arc<[PoolState]>, seed: u64, _explain: bool) -> Self {
        synthetic::admission_call(pools, seed)
    }

    fn nth(pools: &Arc<[PoolState]>, nth: u64) -> Self {
        let mut call = synthetic::admission_call(pools, nth + 1);
        let request = Arc::make_mut(&mut call.request);
        synthetic::vary(request, nth);
        request.tenant = Some(format!("tenant-{}", nth % 3));
        request.priority = nth as i32 % 3 - 1;
        call.native = Admitted::of(request);
        call.now_ms += nth * 10;
        call.unix_ms += nth * 10;
        call
    }
}
