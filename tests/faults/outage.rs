//! All engines dead, and back.

use std::time::{Duration, Instant};

use hyper::StatusCode;

use crate::{
    engines::{Engines, STEADY},
    harness::{client::Reply, eventually, host::completion},
    load::{self, Ask, Expected},
};

const TOKENS: u32 = 10;
/// Streams when an outage begins.
const CLIENTS: usize = 6;

async fn ready(engines: &crate::harness::host::Host) -> StatusCode {
    engines.http.get("/ready").await.status
}

#[tokio::test]
async fn when_all_are_dead_it_says_so_and_serves_as_soon_as_one_is_back() {
    let mut engines = Engines::start(2, &STEADY).await;
    let host = engines.host("").await;
    let expected = Expected::of(engines.http(0), TOKENS).await;
    assert_eq!(ready(&host).await, StatusCode::OK);
    engines.kill(0);
    engines.kill(1);
    eventually("it is not ready", async || (ready(&host).await == StatusCode::SERVICE_UNAVAILABLE).then_some(())).await;
    assert_eq!(host.http.get("/live").await.status, StatusCode::OK);
    let refused: Reply = host.http.post("/v1/completions", completion(3).to_string()).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE, "{}", refused.text());
    let error = &refused.json()["error"];
    assert!(error["code"].is_string() && error["message"].is_string() && error["type"].is_string(), "{error}");

    engines.restart(1).await;
    eventually("it is ready", async || (ready(&host).await == StatusCode::OK).then_some(())).await;
    let began = Instant::now();
    load::run(&host.http, &Ask::ALL, 12, &expected, Instant::now()).await.is_good("after an outage");
    println!("all good {:?} after it was ready", began.elapsed());
}

#[tokio::test]
async fn streams_that_had_begun_wait_for_the_first_that_is_back() {
    let mut engines = Engines::start(2, &STEADY).await;
    let host = engines.host("").await;
    let expected = Expected::of(engines.http(0), 60).await;
    let outage = async {
        eventually("all streams have begun", async || {
            let begun = host.http.metric("dynamo_host_time_to_first_token_seconds_count", &[]).await;
            (begun >= CLIENTS as f64).then_some(())
        })
        .await;
        engines.kill(0);
        engines.kill(1);
        tokio::time::sleep(Duration::from_millis(400)).await;
        engines.restart(0).await;
    };
    let asks = [Ask::ChatStream, Ask::CompletionStream, Ask::ChatStreamOfTwo];
    let (report, ()) = tokio::join!(load::run(&host.http, &asks, CLIENTS, &expected, Instant::now()), outage);
    report.is_good("an outage of less than the hold");
}
