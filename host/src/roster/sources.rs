//! What sources say becomes members: who comes, who is configured anew, and who goes.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use super::{Member, Roster, RosterError, connect, connect::check, lock};
use crate::{
    config::WorkerConfig,
    discovery::{Found, Origin, Problem},
    models::ModelNames,
    tasks,
};

/// How often is looked whether an engine that goes has served its last request.
const LEAVE_EVERY: Duration = Duration::from_millis(50);

impl Roster {
    /// Takes over what the configuration says.
    ///
    /// # Errors
    /// If it cannot be a roster. Nothing is changed then.
    pub(crate) fn configure(self: &Arc<Self>, configs: &[WorkerConfig], names: ModelNames) -> Result<(), RosterError> {
        check_all(configs, self.max_workers)?;
        self.names.store(Arc::new(names));
        self.apply(&Origin::configuration(), Found { workers: configs.to_vec(), problems: Vec::new() });
        Ok(())
    }

    /// Waits for a source to say its workers: until then, nobody knows which models there are.
    #[cfg(any(feature = "kubernetes", test))]
    pub(crate) fn await_source(&self, origin: &Origin) {
        lock(&self.awaited).insert(origin.clone());
        self.is_stale.store(true, Relaxed);
    }

    /// Takes over all that a source says. An engine that it names no more gets no new request, and goes when its last one
    /// has ended; one whose connection is as before goes on as it is.
    pub(crate) fn apply(self: &Arc<Self>, origin: &Origin, found: Found) {
        let Found { workers, mut problems } = found;
        let mut wanted = HashSet::with_capacity(workers.len());
        let (mut made, mut replaced, mut leaving) = (Vec::new(), Vec::new(), Vec::new());
        let mut members = self.members();
        for config in workers {
            let name = config.name.clone();
            let refused = |reason: String| Problem { place: format!("worker {name:?}"), reason };
            let before = members.get(&name).cloned();
            if let Some(before) = &before {
                let is_leaving = before.standing().is_leaving;
                if before.origin != *origin && !is_leaving {
                    problems.push(refused(format!("it is there already, from {}; give it another name", before.origin)));
                    continue;
                }
                wanted.insert(name.clone());
                if before.origin == *origin && before.config == config {
                    if is_leaving {
                        let mut standing = before.standing();
                        standing.is_leaving = false;
                        standing.show();
                    }
                    continue;
                }
            } else if members.len() >= self.max_workers as usize {
                problems.push(refused(format!("there are {} workers already; raise limits.max_workers", self.max_workers)));
                continue;
            }
            match self.member(config, origin, before.as_deref()) {
                Ok(member) => {
                    wanted.insert(name.clone());
                    self.look_after(&member);
                    made.push(Arc::clone(&member));
                    members.insert(name, member);
                    replaced.extend(before);
                }
                Err(reason) => problems.push(refused(reason)),
            }
        }
        for (name, member) in members.iter().filter(|(name, member)| member.origin == *origin && !wanted.contains(*name)) {
            let mut standing = member.standing();
            if !std::mem::replace(&mut standing.is_leaving, true) {
                standing.show();
                tracing::info!(worker = name, source = %origin, "worker is gone from its source, it finishes what it has");
                leaving.push(Arc::clone(member));
            }
        }
        drop(members);
        {
            // Not before: who drains a worker looks for it while this is locked.
            let drained = lock(&self.drained);
            for member in made {
                let mut standing = member.standing();
                standing.is_drained = drained.contains(&member.config.name);
                standing.show();
            }
        }
        for problem in &problems {
            tracing::debug!(source = %origin, "{}: {}", problem.place, problem.reason);
        }
        self.keep_problems(origin, problems);
        lock(&self.awaited).remove(origin);
        self.is_stale.store(true, Relaxed);
        // Nobody shall be given to an engine that its source has taken away.
        self.publish();
        for member in replaced.into_iter().chain(leaving) {
            self.let_go(member);
        }
    }

    /// Keeps what is wrong with a source, until it is heard again.
    pub(crate) fn keep_problems(&self, origin: &Origin, problems: Vec<Problem>) {
        metrics::gauge!("dynamo_host_discovery_problems", "source" => origin.to_string()).set(problems.len() as f64);
        lock(&self.problems).insert(origin.clone(), problems);
    }

    /// An engine to be a member, as it was before where it is the same.
    fn member(&self, config: WorkerConfig, origin: &Origin, before: Option<&Member>) -> Result<Arc<Member>, String> {
        if let Some(before) = before.filter(|before| before.config.is_same_engine(&config)) {
            tracing::info!(worker = config.name, source = %origin, "worker is configured anew");
            return Ok(Arc::new(before.succeed(config, origin.clone(), &self.home())));
        }
        let engine = connect::connect(&config)?;
        if self.is_started.load(Relaxed) {
            tracing::info!(worker = config.name, source = %origin, "worker is new");
        }
        Ok(Arc::new(Member::new(config, origin.clone(), engine, &self.home())))
    }

    /// Lets an engine go when its last request has ended; if it is wanted again by then, it stays.
    fn let_go(self: &Arc<Self>, member: Arc<Member>) {
        let present = self.members().get(&member.config.name).cloned();
        if let Some(present) = present.filter(|present| !Arc::ptr_eq(present, &member)) {
            // Another one has its place. Its engine stays as long as something runs on it.
            if let Some(task) = member.task.get() {
                task.abort();
            }
            if Arc::ptr_eq(&present.engine, &member.engine) {
                return;
            }
        }
        let roster = Arc::clone(self);
        tasks::spawn("let go", async move {
            while member.active_requests() > 0 {
                tokio::time::sleep(LEAVE_EVERY).await;
            }
            let mut members = roster.members();
            let is_present = members.get(&member.config.name).is_some_and(|present| Arc::ptr_eq(present, &member));
            if !is_present || !member.standing().is_leaving {
                return;
            }
            members.remove(&member.config.name);
            drop(members);
            if let Some(task) = member.task.get() {
                task.abort();
            }
            tracing::info!(worker = member.config.name, "worker is removed");
            roster.publish_soon();
        });
    }
}

/// Checks what the configuration says, without starting anything.
///
/// # Errors
/// If it cannot be a roster.
pub(crate) fn check_all(configs: &[WorkerConfig], max_workers: u32) -> Result<(), RosterError> {
    let mut urls: BTreeMap<&str, &str> = BTreeMap::new();
    let mut workers = 0u64;
    for config in configs {
        check(config).map_err(|reason| RosterError::Url { url: config.url.clone(), reason })?;
        if let Some(first) = urls.insert(&config.name, &config.url) {
            let (first, second) = (first.to_owned(), config.url.clone());
            return Err(RosterError::Duplicate { name: config.name.clone(), first, second });
        }
        workers += u64::from(config.ranks.unwrap_or(1));
    }
    if workers > u64::from(max_workers) { Err(RosterError::Full { max: max_workers }) } else { Ok(()) }
}
