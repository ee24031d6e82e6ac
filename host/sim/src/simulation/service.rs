//! The queue in front of the engines: the host's own, driven by the simulator's events.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use dynamo_host_core::{Admitted, RequestFacts, admission::TIERS};
use dynamo_host_flow::{Action, Arrival, Demand, Flow, Room, Ticket};
use dynamo_host_policy::OutcomeRow;

use super::{
    End, Options, Run, SimulationError,
    admission::Admission,
    faults::{CANCELLED, FAILED},
};
use crate::{
    queue::Happening,
    queueing::Queueing,
    requests::ms,
    samples::{Intervals, Quantiles, Random},
};

/// The one pool that there is.
const POOL: u64 = 1;
/// Keeps the seed of leaving clients apart from others.
const LEAVES: u64 = 0x1ea7;
/// What an admission policy is told of one whose time to wait ran out: `end` in `observe`.
const TIMED_OUT: u32 = 4;
/// Weight of the latest output in what is expected of the next.
const ALPHA: f64 = 0.01;

/// What the queue came to.
#[derive(Clone, Debug, Default)]
pub struct QueueTally {
    /// What each tenant's requests came to, in the order in which they were given.
    pub tenants: Vec<TenantTally>,
    /// The longest that the queue was, in requests.
    pub longest: u32,
    /// The admission policy before it, as it was given and as `name@version`; `None`: requests are let in as their tenants have it.
    pub admission: Option<(String, String)>,
}

/// What a tenant's requests came to.
#[derive(Clone, Debug, Default)]
pub struct TenantTally {
    /// Its name.
    pub name: Arc<str>,
    /// How it is let in.
    pub admitted: Admitted,
    /// Requests that came.
    pub came: u64,
    /// Served to their end.
    pub served: u64,
    /// Refused by the policy.
    pub rejected: u64,
    /// Refused because the queue was full, when they came or later.
    pub refused: u64,
    /// They waited until their deadline.
    pub expired: u64,
    /// Their clients left.
    pub left: u64,
    /// Their last attempt failed.
    pub failed: u64,
    /// Not let in by the admission policy.
    pub shed: u64,
    /// Tokens of work of those that started, as they turned out.
    pub work: u64,
    /// Of those that started while every tenant of the tier had requests waiting.
    pub contended_work: u64,
    waits: Intervals,
    ttft: Intervals,
}

impl TenantTally {
    /// Time in the queue in milliseconds, of those that started; 0 if they did at once.
    #[must_use]
    pub fn waits(&self) -> Quantiles {
        self.waits.quantiles()
    }

    /// Time to first token in milliseconds.
    #[must_use]
    pub fn ttft(&self) -> Quantiles {
        self.ttft.quantiles()
    }
}

/// The queue, and who is in it.
pub(super) struct Service<'a> {
    options: &'a Queueing,
    seed: u64,
    flow: Flow,
    open: HashMap<u32, Open>,
    requests: HashMap<Ticket, u32>,
    /// When it is to be looked at again.
    wake: Option<u64>,
    room: Room,
    expected_output: f64,
    chance: Random,
    admission: Option<Admission>,
    /// Requests of each tenant that wait.
    waiting: Vec<u32>,
    /// In each tier, tenants with none.
    content: [u32; TIERS as usize],
    /// What does not agree, if something was found.
    wrong: Option<String>,
    tally: QueueTally,
}

/// A request from its arrival to its end.
struct Open {
    ticket: Ticket,
    tenant: usize,
    came: Duration,
    /// Milliseconds in the queue, once it runs.
    waited: f32,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waiting,
    Running { is_contended: bool },
}

impl<'a> Service<'a> {
    pub(super) fn new(queueing: &'a Queueing, options: &Options, clock: &Arc<AtomicU64>) -> Result<Self, SimulationError> {
        let admission = queueing.admission.as_ref().map(|policy| Admission::new(policy, clock)).transpose()?;
        let tenants = queueing.tenants.iter().map(|tenant| TenantTally {
            name: Arc::clone(&tenant.name),
            admitted: tenant.admitted.clone(),
            ..TenantTally::default()
        });
        let named = queueing.admission.as_ref().zip(admission.as_ref());
        let named = named.map(|(given, loaded)| (given.name.clone(), loaded.label().to_string()));
        Ok(Self {
            admission,
            options: queueing,
            seed: options.seed,
            flow: Flow::new(queueing.bounds),
            open: HashMap::new(),
            requests: HashMap::new(),
            wake: None,
            room: Room::default(),
            expected_output: 0.0,
            chance: Random::new(options.seed ^ LEAVES),
            waiting: vec![0; queueing.tenants.len()],
            content: std::array::from_fn(|tier| {
                queueing.tenants.iter().filter(|tenant| tenant.admitted.tier as usize == tier).count() as u32
            }),
            wrong: None,
            tally: QueueTally { tenants: tenants.collect(), longest: 0, admission: named },
        })
    }

    /// Puts into a request's facts whose it is.
    pub(super) fn mark(&self, number: u32, facts: &mut RequestFacts) {
        if let Some(open) = self.open.get(&number) {
            self.options.tenants[open.tenant].mark(facts);
        }
    }

    pub(super) fn flow(&self) -> &Flow {
        &self.flow
    }

    pub(super) fn wake(&mut self) {
        self.wake = None;
    }

    fn starts(&mut self, number: u32, now: Duration) {
        let Some(open) = self.open.get_mut(&number) else { return };
        let is_contended = self.content[self.options.tenants[open.tenant].admitted.tier as usize] == 0;
        open.waited = ms(now - open.came) as f32;
        self.tally.tenants[open.tenant].waits.add(ms(now - open.came), 1);
        let tenant = open.tenant;
        if std::mem::replace(&mut open.stage, Stage::Running { is_contended }) == Stage::Waiting {
            self.waits_less(tenant);
        }
        let max = self.room.requests.unwrap_or(u32::MAX);
        if self.room.workers == 0 || self.flow.running() > max {
            self.wrong = Some(format!("request {number} started where {} run, with room for {max}", self.flow.running()));
        }
    }

    fn waits_more(&mut self, tenant: usize) {
        self.waiting[tenant] += 1;
        let tier = self.options.tenants[tenant].admitted.tier as usize;
        self.content[tier] -= u32::from(self.waiting[tenant] == 1);
        self.tally.longest = self.tally.longest.max(self.flow.waiting());
    }

    fn waits_less(&mut self, tenant: usize) {
        self.waiting[tenant] -= 1;
        let tier = self.options.tenants[tenant].admitted.tier as usize;
        self.content[tier] += u32::from(self.waiting[tenant] == 0);
    }

    /// Its prompt is computed.
    pub(super) fn prefilled(&mut self, number: u32) {
        if let Some(open) = self.open.get(&number) {
            self.flow.prefilled(open.ticket);
        }
    }

    /// Its first token came.
    pub(super) fn begun(&mut self, number: u32, ttft_ms: f64, now_ms: u64) {
        self.prefilled(number);
        if let Some(open) = self.open.get(&number) {
            self.tally.tenants[open.tenant].ttft.add(ttft_ms, 1);
            self.admission.iter_mut().for_each(|admission| admission.lately.first_token(ttft_ms as f32, now_ms));
        }
    }

    /// A request is no more, and was this much work.
    pub(super) fn gone(&mut self, number: u32, work: u32, output_tokens: u32, end: End, now_ms: u64) {
        let Some(Open { ticket, tenant, stage, .. }) = self.open.remove(&number) else { return };
        self.flow.finish(ticket, work, now_ms);
        self.requests.remove(&ticket);
        if end == End::Served {
            let known = if self.expected_output == 0.0 { 1.0 } else { ALPHA };
            self.expected_output += (f64::from(output_tokens) - self.expected_output) * known;
        }
        if stage == Stage::Waiting {
            self.waits_less(tenant);
        }
        let tally = &mut self.tally.tenants[tenant];
        if let Stage::Running { is_contended } = stage {
            tally.work += u64::from(work);
            tally.contended_work += if is_contended { u64::from(work) } else { 0 };
        }
        tally.count(end);
    }

    /// Sums that must agree at any time.
    pub(super) fn check(&self, open: u64) -> Result<(), String> {
        let (waiting, running, bounds) = (self.flow.waiting(), self.flow.running(), self.options.bounds);
        if let Some(wrong) = &self.wrong {
            return Err(wrong.clone());
        }
        if u64::from(waiting) + u64::from(running) != open || self.open.len() as u64 != open || self.requests.len() as u64 != open
        {
            let known = (self.open.len(), self.requests.len());
            return Err(format!("{waiting} wait and {running} run, and {open} are open, {known:?} of them known"));
        }
        if waiting > bounds.max_requests || self.flow.waiting_tokens() > bounds.max_tokens {
            return Err(format!("{waiting} requests of {} tokens wait, more than {bounds:?}", self.flow.waiting_tokens()));
        }
        if self.waiting.iter().sum::<u32>() != waiting {
            return Err(format!("{:?} of each tenant wait, and {waiting} together", self.waiting));
        }
        Ok(())
    }
}

impl TenantTally {
    fn count(&mut self, end: End) {
        *match end {
            End::Served => &mut self.served,
            End::Rejected => &mut self.rejected,
            End::Failed => &mut self.failed,
            End::Left => &mut self.left,
            End::Expired => &mut self.expired,
            End::Refused => &mut self.refused,
            End::Shed => &mut self.shed,
        } += 1;
    }
}

impl Run<'_> {
    /// A request comes to the queue; to the policy at once, where there is none.
    pub(super) fn enter(&mut self, number: u32) {
        let now_ms = self.now_ms();
        let Some(service) = &mut self.service else { return self.place(number) };
        let request = &self.trace[number as usize];
        let tenant = service.options.tenant_of(number, request, service.seed);
        let of = &service.options.tenants[tenant];
        let prompt_tokens = request.prompt_tokens();
        service.tally.tenants[tenant].came += 1;
        let Some(waiting) = self.waiting.get_mut(&number) else { return };
        of.mark(&mut waiting.facts);
        let admitted = match &mut service.admission {
            None => Some(of.admitted.clone()),
            Some(admission) => {
                waiting.facts.expected_output_tokens = Some(service.expected_output as u32);
                let state = (service.room.workers, service.flow.pool_for(POOL, of.key(), &of.admitted, now_ms));
                let admitted = admission.ask(&waiting.facts, state, of.admitted.clone(), (now_ms, service.seed));
                waiting.facts.expected_output_tokens = None;
                admitted
            }
        };
        let Some(admitted) = admitted else { return self.turn_away(number, tenant, End::Shed) };
        waiting.facts.class.clone_from(&admitted.class);
        waiting.facts.tier = admitted.tier;
        let demand = Demand {
            pool: POOL,
            tenant: of.key(),
            admitted,
            prompt_tokens,
            work: prompt_tokens.saturating_add(service.expected_output as u32),
            deadline_ms: now_ms.saturating_add((service.options.timeout_s * 1000.0) as u64),
        };
        let (share, mean_s) = service.options.leave;
        if share > 0.0 && service.chance.unit() < share {
            let stays = Duration::from_secs_f64(service.chance.exponential(mean_s));
            self.queue.push(self.now + stays, Happening::Leave { request: number });
        }
        let (ticket, is_started) = match service.flow.arrive(demand, now_ms) {
            Ok(Arrival::Started(ticket)) => (ticket, true),
            Ok(Arrival::Queued(ticket)) => (ticket, false),
            Err(_) => return self.turn_away(number, tenant, End::Refused),
        };
        service.admission.iter_mut().for_each(|admission| admission.lately.came(false, now_ms));
        service.open.insert(number, Open { ticket, tenant, came: self.now, waited: f32::NAN, stage: Stage::Waiting });
        service.requests.insert(ticket, number);
        service.waits_more(tenant);
        if is_started {
            service.starts(number, self.now);
            self.place(number);
        }
    }

    /// A request does not come into the queue.
    fn turn_away(&mut self, number: u32, tenant: usize, end: End) {
        self.waiting.remove(&number);
        let now_ms = self.now_ms();
        if let Some(service) = &mut self.service {
            service.tally.tenants[tenant].count(end);
            service.admission.iter_mut().for_each(|admission| admission.lately.came(true, now_ms));
        }
        self.gone(number, 0, end);
    }

    /// Tells the admission policy what became of a request on a worker.
    pub(super) fn tell_admission(&mut self, number: u32, row: OutcomeRow) {
        let now_ms = self.now_ms();
        let Some(Service { admission: Some(admission), open, .. }) = &mut self.service else { return };
        let queue_ms = open.get(&number).map_or(f32::NAN, |open| open.waited);
        admission.lately.tokens(row.itl_ms, now_ms);
        // It decided once, whatever was decided afterwards.
        if let Some(at) = admission.hear(OutcomeRow { decision_id: number.into(), queue_ms, ..row }, self.now) {
            self.queue.push(at, Happening::ObserveAdmitted);
        }
    }

    /// And of one that came to none.
    pub(super) fn tell_admission_of_none(&mut self, number: u32, end: End) {
        let Some(Service { admission: Some(admission), open, .. }) = &mut self.service else { return };
        let end = match end {
            End::Expired => TIMED_OUT,
            End::Left => CANCELLED,
            End::Refused | End::Rejected => FAILED,
            End::Served | End::Failed | End::Shed => return,
        };
        let Some(open) = open.get(&number).filter(|open| open.stage == Stage::Waiting) else { return };
        let row = OutcomeRow {
            decision_id: number.into(),
            worker_id: u64::MAX,
            ttft_ms: f32::NAN,
            itl_ms: f32::NAN,
            queue_ms: ms(self.now - open.came) as f32,
            output_tokens: 0,
            end,
        };
        if let Some(at) = admission.hear(row, self.now) {
            self.queue.push(at, Happening::ObserveAdmitted);
        }
    }

    pub(super) fn bring_to_admission(&mut self) {
        if let Some(Service { admission: Some(admission), .. }) = &mut self.service
            && let Some(at) = admission.bring(self.now)
        {
            self.queue.push(at, Happening::ObserveAdmitted);
        }
    }

    /// Does what the queue says is to be done.
    pub(super) fn serve(&mut self) {
        let now_ms = self.now_ms();
        while let Some(service) = &mut self.service
            && let Some(action) = service.flow.select(now_ms)
        {
            service.flow.apply(action, now_ms);
            let (Action::Start(ticket) | Action::Expire(ticket) | Action::Refuse(ticket)) = action;
            let Some(&number) = service.requests.get(&ticket) else { continue };
            let end = match action {
                Action::Start(_) => {
                    service.starts(number, self.now);
                    self.place(number);
                    continue;
                }
                Action::Expire(_) => End::Expired,
                Action::Refuse(_) => End::Refused,
            };
            self.waiting.remove(&number);
            self.gone(number, 0, end);
        }
        let Some(service) = &mut self.service else { return };
        if let Some(at_ms) = service.flow.wake_at()
            && service.wake.is_none_or(|wake| at_ms < wake)
        {
            service.wake = Some(at_ms);
            self.queue.push(Duration::from_millis(at_ms), Happening::Wake);
        }
    }

    /// Tells the queue what the workers that are there can run.
    pub(super) fn measure_room(&mut self) {
        let Some(service) = &mut self.service else { return };
        let up = || self.engines.iter().filter(|engine| engine.is_up);
        let running = |engine: &crate::engine::Engine| service.options.max_running.unwrap_or(engine.model.profile().max_num_seqs);
        let workers = up().count() as u32;
        service.room = Room {
            workers,
            requests: Some(up().map(running).fold(0, u32::saturating_add)),
            tokens: service.options.prefill_tokens.map(|tokens| tokens.saturating_mul(workers)),
        };
        service.flow.set_room(POOL, service.room);
    }

    /// What the queue came to.
    pub(super) fn take_queue_tally(&mut self) -> Option<Box<QueueTally>> {
        self.service.as_mut().map(|service| Box::new(std::mem::take(&mut service.tally)))
    }
}
