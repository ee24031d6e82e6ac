//! Judges the workers of each pool beside each other: who is much slower than the others, whose time out is over, and who
//! is tried though it failed, since nobody else is there.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use dynamo_host_core::{Among, Role, Worker, WorkerState};
use dynamo_host_flow::{Row, outliers};

use super::{
    GivenUp, Member, Roster, Snapshot,
    snapshot::{Seat, Trial},
};

/// How often is looked whose pause, or grace, is over.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Looks between two comparisons of latencies.
const COMPARE_EVERY: u32 = 10;

/// A worker that is compared: where it sits, how fast it is, and whether it is on trial.
type Compared<'a> = (&'a Seat, Row, bool);

/// Judges again and again, until the task is ended.
pub(super) async fn keep_judging(roster: Arc<Roster>) {
    loop {
        for look in 0..COMPARE_EVERY {
            tokio::time::sleep(LOOK_EVERY).await;
            let snapshot = roster.snapshot();
            if look == 0 && roster.health().outliers.enabled {
                roster.compare(&snapshot);
            }
            roster.look(&snapshot);
            roster.show_links(&snapshot);
        }
    }
}

impl Roster {
    /// Has published whose state is another by now, and gives up those whose grace is over.
    pub(super) fn look(&self, snapshot: &Snapshot) {
        let now_ms = self.clock.now_ms();
        let mut is_stale = false;
        for (worker, seat) in snapshot.fleet.workers().iter().zip(&snapshot.seats) {
            match worker.state {
                WorkerState::Draining => self.end_grace(&seat.member),
                state => {
                    let found = seat.member.standing().state();
                    let now = seat.vitals.refine(found, now_ms);
                    // One that is tried for lack of others shows as suspect while it is not.
                    let is_same = now == state || state == WorkerState::Suspect && !now.is_eligible() && found.is_eligible();
                    is_stale |= !is_same;
                    seat.vitals.show_now(now_ms);
                }
            }
        }
        if is_stale {
            self.publish_soon();
        }
    }

    /// Others continue what a member has whose grace is over, if there are others.
    pub(super) fn end_grace(&self, member: &Member) {
        let grace_ms = self.health().drain_grace_s.saturating_mul(1000);
        let is_over = *member.given_up.borrow() == GivenUp::Not
            && member.is_past_grace(grace_ms, self.clock.now_ms())
            && member.active_requests() > 0;
        if !is_over {
            return;
        }
        let served = member.standing().workers.iter().map(|worker| Arc::clone(&worker.spec)).collect::<Vec<_>>();
        let snapshot = self.snapshot();
        if served.iter().all(|spec| snapshot.fleet.candidates(&spec.model, Among::Beginning).is_some()) {
            member.give_up(GivenUp::Drained);
        }
    }

    /// Compares the latencies of each pool's workers: leaves out who is much slower, and takes back who is not any more.
    pub(super) fn compare(&self, snapshot: &Snapshot) {
        let (now_ms, rules) = (self.clock.now_ms(), self.health().outlier_rules());
        let mut pools: HashMap<(&str, Role), Vec<Compared<'_>>> = HashMap::new();
        for (worker, seat) in snapshot.fleet.workers().iter().zip(&snapshot.seats) {
            let (measure, is_on_trial) = seat.vitals.measure(&rules, now_ms);
            let row = Row { measure, is_serving: worker.state.is_eligible() };
            pools.entry((&worker.spec.model, worker.spec.role)).or_default().push((seat, row, is_on_trial));
        }
        let mut is_stale = false;
        for pool in pools.values() {
            let rows: Vec<Row> = pool.iter().map(|(_, row, _)| *row).collect();
            let slow = outliers(&rows, &rules);
            for &(at, slow) in &slow {
                pool[at].0.vitals.eject(slow, &rules, now_ms);
                is_stale = true;
            }
            for (at, (seat, row, is_on_trial)) in pool.iter().enumerate() {
                if *is_on_trial && row.measure.is_known() && !slow.iter().any(|(slow, _)| *slow == at) {
                    seat.vitals.readmit(now_ms);
                    is_stale = true;
                }
            }
        }
        if is_stale {
            self.publish_soon();
        }
    }
}

/// Makes workers that failed lately candidates where their model, or one of their adapters, has no others: better to try than
/// to refuse. Returns those that are tried beside healthy ones, and are given few requests for that.
pub(super) fn try_all_where_nobody_is_healthy(seated: &mut [(Worker, Seat)]) -> Vec<Trial> {
    let is_out = |state: WorkerState| matches!(state, WorkerState::Suspect | WorkerState::Tripped | WorkerState::Ejected);
    if !seated.iter().any(|(worker, _)| is_out(worker.state)) {
        return Vec::new();
    }
    // What somebody who is well serves: (model, role, adapter).
    let mut served: HashSet<(String, Role, Option<String>)> = HashSet::new();
    for (worker, _) in seated.iter().filter(|(worker, _)| worker.state == WorkerState::Healthy) {
        let spec = &worker.spec;
        served.insert((spec.model.clone(), spec.role, None));
        served.extend(worker.adapters.iter().map(|adapter| (spec.model.clone(), spec.role, Some(adapter.clone()))));
    }
    let mut trials = Vec::new();
    for (worker, seat) in seated.iter_mut().filter(|(worker, _)| is_out(worker.state)) {
        let spec = &worker.spec;
        let is_served = |adapter: Option<String>| served.contains(&(spec.model.clone(), spec.role, adapter));
        let is_needed = !is_served(None) || worker.adapters.iter().any(|adapter| !is_served(Some(adapter.clone())));
        match worker.state {
            _ if is_needed => worker.state = WorkerState::Suspect,
            WorkerState::Suspect => {
                let (vitals, load) = (Arc::clone(&seat.vitals), Arc::clone(&worker.load));
                trials.push(Trial { worker: worker.id, vitals, load });
            }
            _ => {}
        }
    }
    trials
}

#[cfg(test)]
mod tests;
