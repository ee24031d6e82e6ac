//! A policy version: one component with one set of settings, warm and ready to decide.

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use crate::{
    blueprint::{Blueprint, Decided, Failure, Purpose, SetupError, decide, run},
    call::{OutcomeBatch, Subject},
    fault::{FaultCause, PolicyFault},
    identity::{Digest, PolicyName},
    inspect::Inspection,
    pool::{Instance, KEPT_PER_SHARD, Pool},
    question::Question,
    record::{FaultRecord, Instead},
    runtime::Now,
    standing::{Leave, Standing},
    world::World,
};

/// A component with its settings: what decides, and what a request is pinned to.
pub struct PolicyVersion {
    this: Weak<Self>,
    blueprint: Blueprint,
    pool: Pool,
    standing: Standing,
    /// Instances that its pool keeps in each shard: all it can while it decides, none when it has not for a while.
    kept_per_shard: AtomicUsize,
    /// Its instances could not be made: no use in trying before then.
    mend_after_ms: AtomicU64,
    meters: Meters,
    record: FaultRecord,
    tells_roles_apart: bool,
}

struct Meters {
    calls: metrics::Counter,
    seconds: metrics::Histogram,
    fuel: metrics::Histogram,
}

/// No decision: it failed, or it was not asked.
#[derive(Debug)]
pub(crate) enum Undecided {
    /// It failed.
    Fault(PolicyFault),
    /// It was not asked: [`FaultCause::Quarantined`] or [`FaultCause::Revoked`].
    NotAsked(FaultCause),
}

impl Undecided {
    pub(crate) fn cause(&self) -> FaultCause {
        match self {
            Self::Fault(fault) => fault.cause,
            Self::NotAsked(cause) => *cause,
        }
    }

    pub(crate) fn into_fault(self) -> PolicyFault {
        match self {
            Self::Fault(fault) => fault,
            Self::NotAsked(cause) => {
                let detail = match cause {
                    FaultCause::Revoked => "it was rolled back while the request was under way",
                    _ => "it failed too often lately and is not asked for a while",
                };
                PolicyFault { cause, detail: detail.to_owned() }
            }
        }
    }
}

impl PolicyVersion {
    pub(crate) fn new(blueprint: Blueprint) -> Arc<Self> {
        let labels = [("slot", blueprint.slot().to_string()), ("policy", blueprint.label.to_string())];
        let meters = Meters {
            calls: metrics::counter!("dynamo_host_policy_calls_total", &labels),
            seconds: metrics::histogram!("dynamo_host_policy_call_seconds", &labels),
            fuel: metrics::histogram!("dynamo_host_policy_call_fuel", &labels),
        };
        Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            pool: Pool::new(blueprint.shared.shards),
            standing: Standing::new(blueprint.shared.limits.quarantine.clone()),
            kept_per_shard: AtomicUsize::new(KEPT_PER_SHARD),
            mend_after_ms: AtomicU64::new(0),
            meters,
            record: FaultRecord::new(blueprint.slot(), &blueprint.label),
            tells_roles_apart: blueprint.inspection.imports_interface("links"),
            blueprint,
        })
    }

    /// Name, version and author.
    #[must_use]
    pub fn name(&self) -> &PolicyName {
        &self.blueprint.inspection.name
    }

    /// `name@version`, as in metrics and headers.
    #[must_use]
    pub fn label(&self) -> &Arc<str> {
        &self.blueprint.label
    }

    /// Digest of its bytes.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.blueprint.inspection.digest
    }

    /// Its settings, a JSON object.
    #[must_use]
    pub fn settings(&self) -> &str {
        &self.blueprint.settings
    }

    /// The world of questions that it answers.
    #[must_use]
    pub fn world(&self) -> &'static World {
        self.blueprint.inspection.world
    }

    /// What it says of itself.
    #[must_use]
    pub fn inspection(&self) -> &Inspection {
        &self.blueprint.inspection
    }

    /// Whether it learns from outcomes.
    #[must_use]
    pub fn observes(&self) -> bool {
        self.blueprint.inspection.imports_interface("outcomes")
    }

    /// Whether it tells the roles of workers apart: it reads what is known of the links between them, and is shown workers of
    /// all roles.
    #[must_use]
    pub fn tells_roles_apart(&self) -> bool {
        self.tells_roles_apart
    }

    /// Decisions asked of it.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.standing.calls()
    }

    /// Whether it may be asked: neither revoked nor in quarantine.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.standing.is_open()
    }

    pub(crate) fn standing(&self) -> &Standing {
        &self.standing
    }

    pub(crate) fn record(&self) -> &FaultRecord {
        &self.record
    }

    /// The time, outside of decisions.
    pub(crate) fn now(&self) -> Now {
        (self.blueprint.shared.clock)()
    }

    /// Fills its pool. Blocks: each instance reads the settings anew.
    pub(crate) fn warm_up(&self) -> Result<(), SetupError> {
        for shard in self.pool.vacancies(self.kept_per_shard.load(Relaxed)) {
            self.pool.put_into(shard, self.blueprint.instantiate(Purpose::Decide)?);
        }
        Ok(())
    }

    /// Brings its pool to what its standing asks for. Off the request path.
    pub(crate) fn tend(&self) {
        let kept = if self.standing.is_revoked() { 0 } else { self.kept_per_shard.load(Relaxed) };
        self.pool.trim(kept);
        if kept == 0 {
            return;
        }
        if let Err(error) = self.warm_up() {
            let pause = self.blueprint.shared.limits.mending_pause.as_millis() as u64;
            self.mend_after_ms.store(self.now().monotonic_ms.saturating_add(pause), Relaxed);
            let fault = error.into_fault();
            if self.record.note(&fault) {
                let policy = self.label();
                tracing::warn!(%policy, cause = %fault.cause, "a failed instance of the policy cannot be replaced: {}", fault.detail);
            }
        }
    }

    /// Makes it ready to decide again. Blocks while instances are made.
    pub(crate) fn wake(&self) {
        self.kept_per_shard.store(KEPT_PER_SHARD, Relaxed);
        self.record.serve(true);
        self.tend();
    }

    /// It was replaced just now: requests may have pinned it and not asked it yet.
    pub(crate) fn step_down(&self) {
        self.record.serve(false);
        self.keep(1);
    }

    /// It was replaced a while ago: all that it needs can be made anew.
    pub(crate) fn retire(&self) {
        self.record.serve(false);
        self.keep(0);
    }

    /// It is to decide when a later version fails: a few instances are kept for that.
    pub(crate) fn stand_by(&self) {
        if self.kept_per_shard.load(Relaxed) == 0 {
            self.keep(1);
        }
    }

    fn keep(&self, per_shard: usize) {
        self.kept_per_shard.store(per_shard, Relaxed);
        self.ask_for_tending();
    }

    /// Takes it out of use for good: requests that are pinned to it are decided otherwise from now on.
    pub(crate) fn revoke(&self) {
        self.standing.revoke();
        self.record.serve(false);
    }

    /// Takes note of why it did not decide, and of who did instead; the first of a cause is logged, and what leads to a
    /// quarantine: a policy that fails at every request must not flood the log.
    pub(crate) fn did_not_decide(&self, undecided: Undecided, instead: Instead, now_ms: u64) {
        let fault = match undecided {
            Undecided::NotAsked(FaultCause::Quarantined) => return self.record.count_quarantined(instead),
            other => other.into_fault(),
        };
        self.record.count(fault.cause, instead);
        let is_first = self.record.note(&fault);
        let (slot, policy) = (self.blueprint.slot(), self.label());
        if is_first {
            tracing::warn!(
                %slot, %policy, cause = %fault.cause,
                "policy failed, {instead}: {}; further failures of this cause are only counted", fault.detail
            );
        }
        if fault.cause == FaultCause::Revoked {
            return;
        }
        if let Some(quarantine) = self.standing.fault(fault.cause, now_ms) {
            self.record.enter_quarantine(fault.cause);
            let (faults, calls, backoff_s) = (quarantine.faults, quarantine.calls, quarantine.backoff.as_secs_f64());
            tracing::warn!(
                %slot, %policy, cause = %fault.cause,
                "policy is quarantined: {faults} of its last {calls} calls failed; it is tried again in {backoff_s} s, and {instead} until then"
            );
        }
    }

    /// Decides one request.
    ///
    /// # Errors
    /// Why it did not decide. The fault is not recorded here: the slot does, with what it did instead.
    pub fn decide<Q: Question>(&self, call: Q) -> Result<Decided<Q::Verdict>, PolicyFault> {
        self.try_decide(call).map_err(Undecided::into_fault)
    }

    /// Decides one request, if it may be asked.
    pub(crate) fn try_decide<Q: Question>(&self, call: Q) -> Result<Decided<Q::Verdict>, Undecided> {
        let now_ms = call.now().monotonic_ms;
        match self.standing.ask(now_ms) {
            Leave::Open => self.decide_metered(call).map_err(Undecided::Fault),
            Leave::Shut(cause) => Err(Undecided::NotAsked(cause)),
            Leave::Trial(trial) => {
                let decided = self.decide_metered(call);
                match &decided {
                    // It asks for more time: nothing is known yet.
                    Ok(decided) if Q::is_put_off(&decided.verdict) => {}
                    Ok(_) => {
                        if let Some(quarantine) = trial.passed() {
                            self.record.leave_quarantine();
                            let seconds = now_ms.saturating_sub(quarantine.since_ms) as f64 / 1000.0;
                            tracing::info!(
                                slot = %self.blueprint.slot(), policy = %self.label(), failed_trials = quarantine.failed_trials,
                                "policy decides again: it was quarantined for {seconds:.1} s, and its trial was good"
                            );
                        }
                    }
                    Err(fault) if fault.cause.is_the_policys_own() => trial.failed(fault.cause),
                    Err(_) => {}
                }
                decided.map_err(Undecided::Fault)
            }
        }
    }

    fn decide_metered<Q: Question>(&self, call: Q) -> Result<Decided<Q::Verdict>, PolicyFault> {
        self.meters.calls.increment(1);
        let start = Instant::now();
        let decided = self.decide_unmetered(call);
        self.meters.seconds.record(start.elapsed().as_secs_f64());
        if let Ok(decided) = &decided {
            self.meters.fuel.record(decided.fuel as f64);
        }
        decided
    }

    fn decide_unmetered<Q: Question>(&self, call: Q) -> Result<Decided<Q::Verdict>, PolicyFault> {
        let mut instance = self.take()?;
        let decided = decide(&mut instance, call, &self.blueprint.shared.limits);
        self.give_back(instance, decided)
    }

    /// Lets it learn from what has ended. Its decisions are not judged by that: failures here are counted apart and lead
    /// to no quarantine. They cost nobody a request, and one batch at a time what a decision may cost.
    ///
    /// # Errors
    /// Why it did not.
    pub fn observe(&self, outcomes: OutcomeBatch) -> Result<(), PolicyFault> {
        if self.standing.is_revoked() {
            return Ok(());
        }
        let mut instance = self.take()?;
        let seed = outcomes.first().map_or(0, |row| row.decision_id);
        let observe = instance.observe;
        let observed = run(
            &mut instance,
            observe,
            Subject::Observe(outcomes),
            (self.blueprint.shared.clock)(),
            seed,
            &self.blueprint.shared.limits,
        );
        let result = self.give_back(instance, observed.map_err(Failure::Guest)).map(drop);
        if let Err(fault) = &result
            && self.record.note_observe(fault)
        {
            let policy = self.label();
            tracing::warn!(
                %policy, cause = %fault.cause,
                "policy failed to learn from outcomes: {}; further failures of this cause are only counted", fault.detail
            );
        }
        result
    }

    fn take(&self) -> Result<Instance, PolicyFault> {
        self.pool.take().ok_or_else(|| {
            if self.now().monotonic_ms >= self.mend_after_ms.load(Relaxed) {
                self.ask_for_tending();
            }
            let detail = "all its instances are in use or being replaced".to_owned();
            PolicyFault { cause: FaultCause::Busy, detail }
        })
    }

    /// Keeps an instance that is sound; one that failed is replaced off the request path.
    fn give_back<T>(&self, instance: Instance, result: Result<T, Failure>) -> Result<T, PolicyFault> {
        match result {
            Ok(value) => {
                self.pool.put(instance);
                Ok(value)
            }
            Err(Failure::Answer(fault)) => {
                self.pool.put(instance);
                Err(fault)
            }
            Err(Failure::Guest(fault)) => {
                drop(instance);
                self.ask_for_tending();
                Err(fault)
            }
        }
    }

    fn ask_for_tending(&self) {
        // A full queue: it is asked again at the next failure, and a retired version ends with its last request.
        let _ = self.blueprint.shared.tending.try_send(Weak::clone(&self.this));
    }

    /// JSON Schema of its settings.
    ///
    /// # Errors
    /// Why it did not say.
    pub fn settings_schema(&self) -> Result<String, PolicyFault> {
        self.blueprint.settings_schema()
    }

    pub(crate) fn blueprint(&self) -> &Blueprint {
        &self.blueprint
    }
}

impl fmt::Debug for PolicyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyVersion({} {})", self.blueprint.label, self.digest().short())
    }
}
