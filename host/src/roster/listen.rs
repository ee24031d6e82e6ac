//! Listens to one engine: what it tells of its KV goes to the feeds of its workers.

use std::sync::Arc;

use dynamo_engine_api::{KvNote, KvUpdate};
use dynamo_engine_openai::KvEvents;
use dynamo_host_core::Worker;
use futures_util::{FutureExt, StreamExt};

use super::Member;
use crate::{
    clock::Clock,
    kv::{self, KvFeed},
};

/// Listens to a member's engine until the task is ended; anew when its workers are others, since then what it told has come
/// to the wrong ones, or to none.
pub(super) async fn keep_listening(member: &Member, clock: Clock) {
    // Those that are there by now are those that are listened for.
    let _ = member.relisten.notified().now_or_never();
    loop {
        if !member.standing().workers.is_empty() {
            // What was heard before came another way.
            member.standing().feeds.iter().for_each(|feed| feed.begin());
            tokio::select! {
                () = listen(member, clock) => {}
                () = member.relisten.notified() => continue,
            }
        }
        member.relisten.notified().await;
    }
}

async fn listen(member: &Member, clock: Clock) {
    let is_wanted = member.config.kv.events != KvEvents::Off;
    if let Some(mut updates) = is_wanted.then(|| member.engine.kv_events()).flatten() {
        while let Some(update) = updates.next().await {
            take(member, &update, clock.now_ms());
        }
    }
    let reason = "it is not asked, or does not tell".to_owned();
    take(member, &KvUpdate::Note { rank: None, note: KvNote::Silent { reason } }, clock.now_ms());
}

/// Brings an update to those whom it concerns.
fn take(member: &Member, update: &KvUpdate, now_ms: u64) {
    kv::measure(update);
    let (workers, feeds, only_rank) = {
        let standing = member.standing();
        (standing.workers.clone(), standing.feeds.clone(), !standing.has_ranks)
    };
    let name = &member.config.name;
    let of_rank = |rank: Option<u32>| {
        let is_of = move |worker: &Worker| only_rank || rank.is_none_or(|rank| worker.spec.rank == rank);
        workers.iter().zip(&feeds).filter(move |(worker, _)| is_of(worker))
    };
    match update {
        KvUpdate::Reset { rank, cause } => of_rank(*rank).for_each(|(_, feed)| feed.reset(cause)),
        KvUpdate::Note { rank, note } => of_rank(*rank).for_each(|(_, feed)| feed.note(name, note)),
        KvUpdate::Events { rank, model, events, .. } => {
            let of_rank: Vec<(&Worker, &Arc<KvFeed>)> = of_rank(Some(*rank)).collect();
            let whose = match model {
                Some(model) => of_rank.iter().find(|(worker, _)| worker.spec.model == **model),
                None => of_rank.first().filter(|_| of_rank.len() == 1),
            };
            let Some((worker, feed)) = whose else {
                let why = || match model {
                    Some(model) => {
                        format!("it publishes KV events of model {model:?}, which it does not serve here; is its topic right?")
                    }
                    None => "it serves several models, and its KV events do not say of which".to_owned(),
                };
                return of_rank.iter().for_each(|(_, feed)| feed.other_model(name, events.len(), why));
            };
            feed.apply(name, events, worker.block_size(), now_ms);
        }
    }
}
