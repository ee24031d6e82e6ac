//! What is published of hand-offs: for each worker whom it can hand KV to now, for each model how it is served, and what is said
//! when that changes.
//!
//! Invariant: a worker is given a group only while it fits others and has been seen to hand over (`prove`), unless the operator
//! does not want that checked.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use dynamo_host_core::{Handoff, Role, Worker, WorkerState};
use serde::Serialize;

use super::{
    Member, Roster,
    handoff::{self, Claim, Disaggregation, Fit, Part, Shape, Together},
    lock,
    member::Standing,
    snapshot::Seat,
};

/// How a worker stands with hand-offs, for people and tools.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct HandoffReport {
    /// `None`: nothing says how it hands KV over.
    pub(crate) protocol: Option<&'static str>,
    pub(crate) state: HandoffState,
    /// Why it is refused.
    pub(crate) reason: Option<String>,
}

/// Whether a worker has a part in hand-offs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HandoffState {
    /// It was seen to hand over, or that is not checked.
    Ready,
    /// It is being checked.
    Checking,
    /// It gets no hand-offs.
    Refused,
    /// Nobody is there to hand over to.
    Alone,
}

impl Roster {
    /// Whether some worker is there for a part of requests only.
    pub(super) fn has_roles(&self) -> bool {
        self.has_roles.load(Relaxed)
    }

    /// How each model is served that has workers for a part of requests.
    pub(crate) fn report_disaggregation(&self) -> Vec<Disaggregation> {
        lock(&self.disaggregation).clone()
    }

    /// Sets what each worker can do with the KV of others. Returns the models of which that is being checked for the first time.
    pub(super) fn pair(&self, seated: &mut [(Worker, Seat)]) -> HashSet<String> {
        let split: Vec<usize> = (0..seated.len()).filter(|&at| seated[at].0.spec.role != Role::Aggregated).collect();
        self.has_roles.store(!split.is_empty(), Relaxed);
        if split.is_empty() {
            self.say(Vec::new());
            return HashSet::new();
        }
        let claims: Vec<Claim<'_>> = split.iter().map(|&at| claim(&seated[at])).collect();
        let fits = handoff::fits(&claims);
        drop(claims);
        let is_checked = self.health().check_handoffs;
        let (mut coming, mut parts) = (HashSet::new(), BTreeMap::<String, Vec<Part>>::new());
        let mut last: Option<Arc<Member>> = None;
        for (&at, fit) in split.iter().zip(fits) {
            let (worker, Seat { member, .. }) = &mut seated[at];
            let mut standing = member.standing();
            if !last.replace(Arc::clone(member)).is_some_and(|last| Arc::ptr_eq(&last, member)) {
                standing.fits.clear();
            }
            let is_proven = standing.proof.is_proven || !is_checked;
            let protocol = member.engine.handoff();
            worker.handoff = Handoff {
                serves_whole: protocol.is_none_or(dynamo_engine_api::Protocol::serves_whole),
                group: if let Fit::With(key) = fit { Some(key).filter(|_| is_proven) } else { None },
            };
            let is_due = matches!(fit, Fit::With(_)) && !is_proven && worker.state.is_eligible();
            if is_due {
                self.prove_soon.notify_one();
            }
            let is_new = is_due && standing.proof.is_new();
            if is_new {
                coming.insert(worker.spec.model.clone());
            }
            let part = part(worker, is_new || worker.state == WorkerState::Starting);
            parts.entry(worker.spec.model.clone()).or_default().push(part);
            standing.fits.push(fit);
        }
        for (worker, _) in seated.iter().filter(|(worker, _)| worker.spec.role == Role::Aggregated) {
            if let Some(parts) = parts.get_mut(&worker.spec.model) {
                parts.push(part(worker, false));
            }
        }
        self.say(parts.iter().filter_map(|(model, parts)| Disaggregation::of(model, parts)).collect());
        coming
    }

    /// Says how models are served, where that has changed.
    fn say(&self, now: Vec<Disaggregation>) {
        let mut said = lock(&self.disaggregation);
        if *said == now {
            return;
        }
        let gone = said.iter().filter(|old| !now.iter().any(|new| new.model == old.model));
        for (model, state) in gone.map(|old| (&old.model, None)).chain(now.iter().map(|new| (&new.model, Some(new.state)))) {
            for each in Together::ALL {
                let labels = [("model", model.clone()), ("state", each.label().to_owned())];
                metrics::gauge!("dynamo_host_disaggregation", &labels).set(f64::from(u8::from(state == Some(each))));
            }
        }
        for new in now.iter().filter(|new| !new.is_coming && !said.contains(new)) {
            match &new.reason {
                None => tracing::info!(model = new.model, "prefill and decode are apart, where the policy wants that"),
                Some(reason) => tracing::warn!(model = new.model, "{reason}"),
            }
        }
        *said = now;
    }
}

fn part(worker: &Worker, is_coming: bool) -> Part {
    Part {
        role: worker.spec.role,
        is_eligible: worker.state.is_eligible(),
        serves_whole: worker.handoff.serves_whole,
        group: worker.handoff.group,
        is_coming,
    }
}

fn claim((worker, Seat { member, .. }): &(Worker, Seat)) -> Claim<'_> {
    let standing = member.standing();
    let model = worker.spec.model.as_str();
    Claim {
        engine: &member.config.name,
        kind: member.engine.kind(),
        model,
        role: worker.spec.role,
        shape: Shape {
            protocol: member.engine.handoff(),
            block_size: worker.block_size(),
            tokens: standing.tokens,
            context: standing.max_model_len(model),
        },
        is_known: standing.found().is_eligible(),
    }
}

/// How one of a member's workers, by its place, stands with hand-offs; `None`: it has no part in them.
pub(super) fn report(member: &Member, standing: &Standing, place: usize, is_checked: bool) -> Option<HandoffReport> {
    if member.config.role == Role::Aggregated {
        return None;
    }
    let (state, reason) = match standing.fits.get(place).unwrap_or(&Fit::Alone) {
        Fit::Alone => (HandoffState::Alone, None),
        Fit::Nobody(reason) => (HandoffState::Refused, Some(reason.clone())),
        Fit::With(_) if standing.proof.is_proven || !is_checked => (HandoffState::Ready, None),
        Fit::With(_) => match &standing.proof.refused {
            Some(reason) => (HandoffState::Refused, Some(reason.clone())),
            None => (HandoffState::Checking, None),
        },
    };
    Some(HandoffReport { protocol: member.engine.handoff().map(dynamo_engine_api::Protocol::name), state, reason })
}
