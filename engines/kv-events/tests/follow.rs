//! A subscriber and a publisher over real sockets.

use std::{collections::BTreeSet, time::Duration};

use dynamo_engine_api::{EngineHash, KvEvent, KvNote, KvUpdate, KvUpdates, Tier};
use dynamo_engine_kv_events::{Endpoint, Form, Publisher, PublisherOptions, Source, subscribe};
use futures_util::StreamExt;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);

fn endpoint(text: &str) -> Endpoint {
    text.parse().unwrap()
}

fn options() -> PublisherOptions {
    PublisherOptions {
        endpoint: endpoint("tcp://127.0.0.1:0"),
        connects: false,
        replay: Some(endpoint("tcp://127.0.0.1:0")),
        topic: "kv@127.0.0.1:8000@m".to_owned(),
        buffer_steps: 100,
        form: Form::Map,
        drop_every: None,
    }
}

fn source(publisher: &Publisher) -> Source {
    Source {
        endpoint: publisher.endpoint().clone(),
        connects_to_us: false,
        replay: publisher.replay().cloned(),
        topic: "kv".to_owned(),
        rank: 0,
    }
}

fn removed(hash: u64) -> Vec<KvEvent> {
    vec![KvEvent::Removed { hashes: vec![EngineHash(hash)], tier: Tier::Device }]
}

/// Hashes that were told, until `hash` was, and the causes of resets between; what was told before a reset does not count.
async fn told_until(updates: &mut KvUpdates, hash: u64) -> (Vec<u64>, Vec<&'static str>) {
    let (mut hashes, mut resets) = (Vec::new(), Vec::new());
    while hashes.last() != Some(&hash) {
        match timeout(PATIENCE, updates.next()).await.expect("it is told in time").unwrap() {
            KvUpdate::Events { events, .. } => hashes.extend(events.iter().map(|event| match event {
                KvEvent::Removed { hashes, .. } => hashes[0].0,
                other => panic!("{other:?}"),
            })),
            KvUpdate::Reset { cause, .. } => {
                resets.push(cause);
                hashes.clear();
            }
            KvUpdate::Note { .. } => {}
        }
    }
    (hashes, resets)
}

async fn noted(updates: &mut KvUpdates, wanted: impl Fn(&KvNote) -> bool) {
    loop {
        if let KvUpdate::Note { note, .. } = timeout(PATIENCE, updates.next()).await.expect("it is noted in time").unwrap()
            && wanted(&note)
        {
            return;
        }
    }
}

#[tokio::test]
async fn what_was_published_before_anyone_listened_is_told_first() {
    let publisher = Publisher::start(options()).await.unwrap();
    for hash in 1..=3 {
        publisher.publish(removed(hash)).await;
    }
    let mut updates = subscribe(vec![source(&publisher)]);
    assert_eq!(told_until(&mut updates, 3).await, (vec![1, 2, 3], vec![]));
    noted(&mut updates, |note| *note == KvNote::Current).await;
    publisher.publish(removed(4)).await;
    assert_eq!(told_until(&mut updates, 4).await, (vec![4], vec![]));
}

#[tokio::test]
async fn a_gap_is_closed_by_replay_in_order_and_nothing_is_told_twice() {
    let publisher =
        Publisher::start(PublisherOptions { drop_every: Some(3), form: Form::Positional, ..options() }).await.unwrap();
    let mut updates = subscribe(vec![source(&publisher)]);
    noted(&mut updates, |note| *note == KvNote::Current).await;
    for hash in 1..=20 {
        publisher.publish(removed(hash)).await;
    }
    assert_eq!(told_until(&mut updates, 20).await, ((1..=20).collect(), vec![]));
    // The last one of all is lost, and no other will show that.
    publisher.publish(removed(21)).await;
    publisher.publish(removed(22)).await;
    assert_eq!(told_until(&mut updates, 22).await, (vec![21, 22], vec![]));
}

#[tokio::test]
async fn a_gap_that_nobody_replays_is_a_reset() {
    let publisher = Publisher::start(PublisherOptions { drop_every: Some(3), replay: None, ..options() }).await.unwrap();
    let mut updates = subscribe(vec![source(&publisher)]);
    noted(&mut updates, |note| *note == KvNote::Current).await;
    // Whether the subscription is there is known by its first batch alone.
    let mut hash = 0;
    let (told, resets) = loop {
        hash += 1;
        publisher.publish(removed(hash)).await;
        if let Ok(told) = timeout(Duration::from_millis(100), told_until(&mut updates, hash)).await {
            break told;
        }
    };
    let mut all: BTreeSet<u64> = told.into_iter().collect();
    let mut causes = resets;
    for _ in 0..8 {
        hash += 1;
        publisher.publish(removed(hash)).await;
        if (hash - 1) % 3 != 0 {
            let (told, resets) = told_until(&mut updates, hash).await;
            all.extend(told);
            causes.extend(resets);
        }
    }
    assert!(causes.len() >= 2 && causes.iter().all(|cause| *cause == "gap"), "{causes:?}");
    assert!(all.iter().all(|hash| *hash == 1 || (hash - 1) % 3 != 0), "{all:?}");
}

#[tokio::test]
async fn a_publisher_that_starts_anew_is_told_from_the_one_before() {
    let before = Publisher::start(options()).await.unwrap();
    let mut updates = subscribe(vec![source(&before)]);
    for hash in 1..=3 {
        before.publish(removed(hash)).await;
    }
    told_until(&mut updates, 3).await;
    let same = PublisherOptions { endpoint: before.endpoint().clone(), replay: before.replay().cloned(), ..options() };
    drop(before);
    let after = loop {
        // The ports are free when the system says so.
        match Publisher::start(same.clone()).await {
            Ok(after) => break after,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    for hash in 11..=15 {
        after.publish(removed(hash)).await;
    }
    assert_eq!(told_until(&mut updates, 15).await, ((11..=15).collect(), vec!["restart"]));
}

#[tokio::test]
async fn a_publisher_that_connects_to_us_is_heard() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let meeting = endpoint(&format!("tcp://127.0.0.1:{port}"));
    let listener = Source { endpoint: meeting.clone(), connects_to_us: true, replay: None, topic: String::new(), rank: 0 };
    let mut updates = subscribe(vec![listener]);
    let nobody = |note: &KvNote| match note {
        KvNote::Silent { reason } => reason.contains("nobody has connected to tcp://127.0.0.1:"),
        KvNote::Current => panic!("nobody is there"),
        _ => false,
    };
    noted(&mut updates, nobody).await;
    let publisher =
        Publisher::start(PublisherOptions { endpoint: meeting, connects: true, replay: None, ..options() }).await.unwrap();
    let mut hash = 0;
    loop {
        publisher.publish(removed(hash)).await;
        let current = noted(&mut updates, |note| *note == KvNote::Current);
        if timeout(Duration::from_millis(200), current).await.is_ok() {
            break;
        }
        hash += 1;
        assert!(hash < 150, "the subscription never took hold");
    }
    loop {
        hash += 1;
        publisher.publish(removed(hash)).await;
        if timeout(Duration::from_millis(200), told_until(&mut updates, hash)).await.is_ok() {
            break;
        }
        assert!(hash < 150, "the subscription never took hold");
    }
}
