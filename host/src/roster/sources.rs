//! What sources say becomes members: who comes, who is configured anew, and who goes.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use super::{
    Member, Roster, RosterError,
    connect::{self, Connection, Credentials, check},
    lock,
};
use crate::{
    config::WorkerConfig,
    discovery::{Found, Origin, Problem},
    models::ModelNames,
    tasks,
};

/// How often is looked whether an engine that goes has served its last request.
const LEAVE_EVERY: Duration = Duration::from_millis(50);
/// How often is looked whether what was refused can be taken over, and whether tokens and certificates have changed.
const APPLY_EVERY: Duration = Duration::from_secs(2);

/// What a source last said.
#[derive(Default)]
pub(super) struct Said {
    found: Found,
    /// Something of it could not be taken over.
    is_refused: bool,
}

impl Roster {
    /// Takes over what the configuration says.
    ///
    /// # Errors
    /// If it cannot be a roster. Nothing is changed then.
    pub(crate) fn configure(self: &Arc<Self>, configs: &[WorkerConfig], names: ModelNames) -> Result<(), RosterError> {
        check_all(configs, self.max_workers)?;
        self.names.store(Arc::new(names));
        self.is_stale.store(true, Relaxed);
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
    /// has ended; one whose connection is as before goes on as it is. What other sources said and was refused may have a
    /// place now. Blocks on the files of tokens and certificates.
    pub(crate) fn apply(self: &Arc<Self>, origin: &Origin, found: Found) {
        let mut said = lock(&self.said);
        if lock(&self.awaited).remove(origin) {
            self.is_stale.store(true, Relaxed);
        }
        let news = said.entry(origin.clone()).or_default();
        news.found = found;
        let mut gone = self.take_over(origin, news);
        for (other, said) in said.iter_mut().filter(|(other, said)| *other != origin && said.is_refused) {
            gone.extend(self.take_over(other, said));
        }
        self.show(gone);
    }

    /// [`Self::apply`] for a task that must not block.
    pub(crate) async fn hear(self: &Arc<Self>, origin: &Origin, found: Found) {
        let (roster, origin) = (Arc::clone(self), origin.clone());
        let applied = tokio::task::spawn_blocking(move || roster.apply(&origin, found));
        // It fails only if applying panicked, which the task that waits here shall say.
        applied.await.expect("applying what a source says does not panic");
    }

    /// Takes over again what was refused when it was said, and what has another token or other certificates by now. Blocks
    /// on their files.
    pub(super) fn apply_again(self: &Arc<Self>) {
        let mut gone = Vec::new();
        let mut said = lock(&self.said);
        for (origin, said) in said.iter_mut() {
            if said.is_refused || !self.is_current(&said.found) {
                gone.extend(self.take_over(origin, said));
            }
        }
        self.show(gone);
    }

    /// Whether all of these are connected with the credentials that there are now.
    fn is_current(&self, found: &Found) -> bool {
        found.workers.iter().filter(|config| config.bearer.is_some() || config.ca_file.is_some()).all(|config| {
            let member = self.members().get(&config.name).cloned();
            member.is_some_and(|member| member.credentials == Credentials::of(config))
        })
    }

    /// Publishes what was taken over: nobody shall be given to an engine that its source has taken away.
    fn show(self: &Arc<Self>, gone: Vec<Arc<Member>>) {
        self.publish();
        for member in gone {
            self.let_go(member);
        }
    }

    /// Makes members of what a source has said. Returns those that go when their last request has ended.
    fn take_over(self: &Arc<Self>, origin: &Origin, said: &mut Said) -> Vec<Arc<Member>> {
        let workers = &said.found.workers;
        let named: HashSet<&str> = workers.iter().map(|config| config.name.as_str()).collect();
        let (connected, refused) = self.connect_all(origin, workers);
        said.is_refused = !refused.is_empty();
        self.keep_problems(origin, said.found.problems.iter().cloned().chain(refused).collect());
        let mut gone = Vec::new();
        let mut is_other = false;
        // Who drains a worker looks for it while this is locked.
        let drained = lock(&self.drained);
        let mut members = self.members();
        for (config, connection) in connected {
            let name = &config.name;
            let before = members.get(name).cloned();
            if let Some(before) = &before
                && before.origin == *origin
                && before.config == *config
                && Arc::ptr_eq(&before.engine, &connection.engine)
            {
                let mut standing = before.standing();
                is_other |= std::mem::replace(&mut standing.is_leaving, false);
                let is_drained = standing.is_drained;
                standing.drains(is_drained, None, self.clock.now_ms());
                standing.show();
                drop(standing);
                if !is_drained {
                    before.is_wanted_again();
                }
                continue;
            }
            let member = Arc::new(self.member(config.clone(), origin, connection, before.as_deref()));
            member.standing().is_drained = drained.contains(name);
            member.standing().show();
            if let Some(before) = before {
                before.end_task();
                // Unless what runs goes on with its successor.
                if !before.config.is_same_engine(config) {
                    before.standing().leaves(self.clock.now_ms());
                    gone.push(before);
                }
            }
            self.look_after(&member);
            members.insert(name.clone(), member);
            is_other = true;
        }
        for (name, member) in members.iter().filter(|(name, member)| member.origin == *origin && !named.contains(name.as_str())) {
            let mut standing = member.standing();
            if !standing.is_leaving {
                standing.leaves(self.clock.now_ms());
                standing.show();
                tracing::info!(worker = name, source = %origin, "worker is gone from its source, it finishes what it has");
                gone.push(Arc::clone(member));
                is_other = true;
            }
        }
        if is_other {
            self.is_stale.store(true, Relaxed);
        }
        gone
    }

    /// Connects to those of a source's workers that can be members; and says why others cannot. Files are read here, while
    /// nothing is locked that a request may wait for.
    fn connect_all<'a>(
        &self,
        origin: &Origin,
        workers: &'a [WorkerConfig],
    ) -> (Vec<(&'a WorkerConfig, Connection)>, Vec<Problem>) {
        let (mut connected, mut refused) = (Vec::with_capacity(workers.len()), Vec::new());
        let mut room = (self.max_workers as usize).saturating_sub(self.members().len());
        for config in workers {
            let before = self.members().get(&config.name).cloned();
            let connection = match &before {
                Some(before) if before.origin != *origin && !before.standing().is_leaving => {
                    Err(format!("it is there already, from {}; give it another name", before.origin))
                }
                None if room == 0 => Err(format!("there are {} workers already; raise limits.max_workers", self.max_workers)),
                Some(before) if before.config.is_same_engine(config) && before.credentials == Credentials::of(config) => {
                    Ok(Connection { engine: Arc::clone(&before.engine), credentials: before.credentials })
                }
                _ => connect::connect(config),
            };
            match connection {
                Ok(connection) => {
                    room -= usize::from(before.is_none());
                    connected.push((config, connection));
                }
                Err(reason) => refused.push(Problem { place: format!("worker {:?}", config.name), reason }),
            }
        }
        (connected, refused)
    }

    /// Keeps what is wrong with a source, until it is heard again.
    pub(crate) fn keep_problems(&self, origin: &Origin, problems: Vec<Problem>) {
        metrics::gauge!("dynamo_host_discovery_problems", "source" => origin.to_string()).set(problems.len() as f64);
        let mut kept = lock(&self.problems);
        if kept.get(origin) != Some(&problems) {
            for problem in &problems {
                tracing::debug!(source = %origin, "{}: {}", problem.place, problem.reason);
            }
            kept.insert(origin.clone(), problems);
        }
    }

    /// An engine to be a member, with what is known of it where it is the same as before.
    fn member(&self, config: WorkerConfig, origin: &Origin, connection: Connection, before: Option<&Member>) -> Member {
        let Some(before) = before.filter(|before| before.config.is_same_engine(&config)) else {
            if self.is_started.load(Relaxed) {
                tracing::info!(worker = config.name, source = %origin, "worker is new");
            }
            return Member::new(config, origin.clone(), connection, &self.home());
        };
        if Arc::ptr_eq(&before.engine, &connection.engine) {
            tracing::info!(worker = config.name, source = %origin, "worker is configured anew");
        } else {
            tracing::info!(worker = config.name, source = %origin, "worker has another token or other certificates");
        }
        before.succeed(config, origin.clone(), connection, &self.home())
    }

    /// Lets an engine go when its last request has ended; if it is wanted again by then, it stays.
    fn let_go(self: &Arc<Self>, member: Arc<Member>) {
        if !member.begin_await() {
            return;
        }
        let roster = Arc::clone(self);
        tasks::spawn("let go", async move {
            while !member.ends_await() {
                if member.active_requests() == 0 && roster.remove(&member) {
                    return;
                }
                // One whose place another engine has is on no snapshot any more.
                roster.end_grace(&member);
                tokio::time::sleep(LEAVE_EVERY).await;
            }
        });
    }

    /// Removes a member that still leaves; returns whether it did.
    fn remove(&self, member: &Arc<Member>) -> bool {
        let name = &member.config.name;
        let mut members = self.members();
        if !member.standing().is_leaving {
            return false;
        }
        // Another one may have its place.
        if members.get(name).is_some_and(|present| Arc::ptr_eq(present, member)) {
            members.remove(name);
            tracing::info!(worker = name, "worker is removed");
        }
        drop(members);
        member.standing().forget_handoffs(&self.links);
        member.end_task();
        self.publish_soon();
        true
    }
}

/// Applies again and again what may have come to be possible, until the task is ended.
pub(super) async fn keep_applying(roster: Arc<Roster>) {
    loop {
        tokio::time::sleep(APPLY_EVERY).await;
        let roster = Arc::clone(&roster);
        let applied = tokio::task::spawn_blocking(move || roster.apply_again());
        applied.await.expect("applying what sources say does not panic");
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
