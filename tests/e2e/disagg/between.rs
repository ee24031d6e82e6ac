//! Leaving between the two legs: workers, the host and clients that go when the prompt is being computed, or is, and nothing of the
//! output has come.
//!
//! The engines wait at their part until they are let go, so that each change falls where it is meant to.

use std::{fs, path::Path, sync::Arc};

use serde_json::Value;
use tokio::{sync::Semaphore, task::JoinSet};

use super::doubles::{Leg, keeps, leg, legs, tokens};
use crate::{
    harness::{
        client::Client,
        eventually,
        host::{Host, chat, streamed},
        scripted::{Connection, Scripted},
        sse::Streamed,
    },
    workers::{workers, workers_until},
};

const CHAT: &str = "/v1/chat/completions";

/// An engine whose part waits until it is let go.
struct Held {
    engine: Scripted,
    gate: Arc<Semaphore>,
    /// A permit for each client that left while it waited.
    left: Arc<Semaphore>,
}

impl Held {
    /// Waits at parts of this kind.
    async fn at(part: Leg) -> Self {
        let (gate, left) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let (waits, leaves) = (Arc::clone(&gate), Arc::clone(&left));
        let engine = Scripted::start(move |mut connection: Connection| {
            let (gate, left) = (Arc::clone(&waits), Arc::clone(&leaves));
            async move {
                let asked = connection.asked().clone();
                if leg(&asked) == part {
                    tokio::select! {
                        permit = gate.acquire() => permit.unwrap().forget(),
                        () = connection.hung_up() => {
                            left.add_permits(1);
                            return;
                        }
                    }
                }
                let answer = if leg(&asked) == Leg::Prefill { keeps(&asked, 0) } else { tokens(&asked, 0) };
                connection.write(answer).await;
            }
        })
        .await;
        Self { engine, gate, left }
    }

    /// An engine that waits at nothing.
    async fn never() -> Self {
        let held = Self::at(Leg::Prefill).await;
        held.let_go();
        held
    }

    /// Until it was asked for its part.
    async fn is_asked(&self) {
        eventually("it is asked", async || (!self.engine.received().is_empty()).then_some(())).await;
    }

    /// From here on it waits no more.
    fn let_go(&self) {
        self.gate.add_permits(1000);
    }

    fn legs(&self) -> Vec<Leg> {
        legs(&self.engine)
    }

    fn worker(&self, name: &str, role: &str) -> String {
        format!("{},name={name},role={role},handoff=nixl", self.engine.worker())
    }

    /// A file of this worker, in the manner of tools.
    fn put(&self, directory: &Path, name: &str, role: &str) {
        let url = self.engine.url();
        let text = format!("url = '{url}'\nname = '{name}'\nmodel = 'm'\nrole = '{role}'\nhandoff = 'nixl'\n");
        let temporary = directory.join(format!(".{name}.tmp"));
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, directory.join(format!("{name}.toml"))).unwrap();
    }
}

async fn over(workers: &[String]) -> Host {
    let arguments: Vec<&str> =
        std::iter::once("--expose-worker").chain(workers.iter().flat_map(|worker| ["--worker", worker])).collect();
    Host::configured("[health]\ncheck_handoffs = false\n", &arguments).await
}

/// A stream of two tokens that is under way.
fn asks(http: &Client) -> JoinSet<Streamed> {
    let http = http.clone();
    let mut asked = JoinSet::new();
    asked.spawn(async move { http.stream(CHAT, &streamed(chat(2))).await });
    asked
}

/// Its end.
async fn answered(mut asked: JoinSet<Streamed>) -> Streamed {
    let stream = asked.join_next().await.unwrap().unwrap();
    assert_eq!(stream.text(), "t0 t1");
    stream
}

async fn is_idle(host: &Host) {
    eventually("nothing is in flight", async || {
        let in_flight = host.http.metric("dynamo_host_requests_in_flight", &[]).await;
        let rows = workers(host).await;
        let active = |row: &Value| row["active_requests"].as_f64().unwrap_or_default() > 0.0;
        (in_flight == 0.0 && !rows.iter().any(active)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn who_is_drained_while_the_prompt_is_computed_does_not_decode_it() {
    let (prefill, drained, other) = (Held::at(Leg::Prefill).await, Held::never().await, Held::never().await);
    let host =
        over(&[prefill.worker("p", "prefill"), drained.worker("drained", "decode"), other.worker("other", "decode")]).await;
    let asked = asks(&host.http);
    prefill.is_asked().await;
    host.cli(&["worker", "drain", "drained"]).await.succeeded();
    prefill.let_go();
    assert_eq!(answered(asked).await.header("x-dynamo-worker"), "other");
    assert_eq!((prefill.legs(), drained.legs(), other.legs()), (vec![Leg::Prefill], vec![], vec![Leg::Decode]));

    // The only one that is left goes, too.
    let (prefill, drained) = (Held::at(Leg::Prefill).await, Held::never().await);
    let host = over(&[prefill.worker("p", "prefill"), drained.worker("drained", "decode")]).await;
    let asked = asks(&host.http);
    prefill.is_asked().await;
    host.cli(&["worker", "drain", "drained"]).await.succeeded();
    prefill.let_go();
    assert_eq!(answered(asked).await.header("x-dynamo-worker"), "p", "who prefilled serves it whole");
    assert_eq!((prefill.legs(), drained.legs()), (vec![Leg::Prefill, Leg::Whole], vec![]));
    is_idle(&host).await;
}

#[tokio::test]
async fn what_a_drained_worker_computed_is_still_fetched_and_what_it_decodes_comes() {
    for part in [Leg::Prefill, Leg::Decode] {
        let (prefill, decode) = (Held::at(part).await, Held::at(part).await);
        let host = over(&[prefill.worker("p", "prefill"), decode.worker("d", "decode")]).await;
        let asked = asks(&host.http);
        let (held, name) = if part == Leg::Prefill { (&prefill, "p") } else { (&decode, "d") };
        held.is_asked().await;
        host.cli(&["worker", "drain", name]).await.succeeded();
        held.let_go();
        assert_eq!(answered(asked).await.header("x-dynamo-worker"), "d");
        assert_eq!((prefill.legs(), decode.legs()), (vec![Leg::Prefill], vec![Leg::Decode]), "{name} was drained");
        let finished = host.cli(&["worker", "drain", name, "--wait", "10"]).await;
        finished.succeeded();
    }
}

#[tokio::test]
async fn a_drained_worker_is_not_idle_while_its_kv_waits_for_who_decodes() {
    let (prefill, decode) = (Held::never().await, Held::at(Leg::Decode).await);
    let host = over(&[prefill.worker("p", "prefill"), decode.worker("d", "decode")]).await;
    let asked = asks(&host.http);
    decode.is_asked().await;
    host.cli(&["worker", "drain", "p", "--wait", "0"]).await.failed(1, &["is drained"]);
    decode.let_go();
    answered(asked).await;
    host.cli(&["worker", "drain", "p", "--wait", "10"]).await.succeeded();
    assert_eq!((prefill.legs(), decode.legs()), (vec![Leg::Prefill], vec![Leg::Decode]));
}

#[tokio::test]
async fn a_host_that_is_told_to_stop_between_the_legs_finishes_both() {
    for part in [Leg::Prefill, Leg::Decode] {
        let (prefill, decode) = (Held::at(part).await, Held::at(part).await);
        let mut host = over(&[prefill.worker("p", "prefill"), decode.worker("d", "decode")]).await;
        let asked = asks(&host.http);
        let held = if part == Leg::Prefill { &prefill } else { &decode };
        held.is_asked().await;
        host.process.signal("TERM");
        eventually("it is not ready", async || (host.http.get("/ready").await.status.as_u16() == 503).then_some(())).await;
        held.let_go();
        answered(asked).await;
        assert_eq!((prefill.legs(), decode.legs()), (vec![Leg::Prefill], vec![Leg::Decode]), "at {part:?}");
        assert_eq!(host.process.ended().await.code(), Some(0));
    }
}

#[tokio::test]
async fn a_worker_that_is_withdrawn_and_comes_back_between_the_legs_costs_no_request() {
    for name in ["p", "d"] {
        let (prefill, decode) = (Held::at(Leg::Prefill).await, Held::never().await);
        let directory = tempfile::tempdir().unwrap();
        prefill.put(directory.path(), "p", "prefill");
        decode.put(directory.path(), "d", "decode");
        let source = format!("file:{}", directory.path().display());
        let host = Host::configured("[health]\ncheck_handoffs = false\n", &["--discovery", &source, "--expose-worker"]).await;
        let are_healthy = |rows: &[Value]| rows.len() == 2 && rows.iter().all(|row| row["state"] == "healthy");
        workers_until(&host, "both are healthy", are_healthy).await;
        let asked = asks(&host.http);
        prefill.is_asked().await;
        fs::remove_file(directory.path().join(format!("{name}.toml"))).unwrap();
        workers_until(&host, "it is withdrawn", |rows| !are_healthy(rows)).await;
        let (held, role) = if name == "p" { (&prefill, "prefill") } else { (&decode, "decode") };
        held.put(directory.path(), name, role);
        workers_until(&host, "it is back", are_healthy).await;
        prefill.let_go();
        assert_eq!(answered(asked).await.header("x-dynamo-worker"), "d");
        assert_eq!((prefill.legs(), decode.legs()), (vec![Leg::Prefill], vec![Leg::Decode]), "{name} was withdrawn");
        is_idle(&host).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_between_the_legs_leaves_nothing_at_work() {
    for part in [Leg::Prefill, Leg::Decode] {
        let (prefill, decode) = (Held::at(part).await, Held::at(part).await);
        let host = over(&[prefill.worker("p", "prefill"), decode.worker("d", "decode")]).await;
        let mut asked = asks(&host.http);
        let held = if part == Leg::Prefill { &prefill } else { &decode };
        held.is_asked().await;
        asked.shutdown().await;
        // Whoever has the ticket gives up what it has not fetched, when it is left.
        eventually("its engine is left", async || (held.left.available_permits() == 1).then_some(())).await;
        is_idle(&host).await;
        let expected = if part == Leg::Prefill { (1, 0) } else { (1, 1) };
        assert_eq!((prefill.legs().len(), decode.legs().len()), expected, "at {part:?}");
    }
}
