//! Workers that come and go with files in a directory.

use std::{fs, path::Path};

use dynamo_engine_mock::tokens;
use hyper::StatusCode;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    harness::{
        eventually,
        host::{Host, completion, streamed},
        process::run,
        scripted::{Scripted, whole_answer},
    },
    workers::{workers, workers_until},
};

const COMPLETIONS: &str = "/v1/completions";

async fn over(arguments: &[&str]) -> (Host, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let source = format!("file:{}", directory.path().display());
    let host = Host::start_anyhow(&[&["--discovery", &source, "--expose-worker"], arguments].concat()).await;
    (host, directory)
}

/// Writes a worker's file as tools should: beside, and then into place.
fn put(directory: &Path, file: &str, text: &str) {
    let temporary = directory.join(format!(".{file}.tmp"));
    fs::write(&temporary, text).unwrap();
    fs::rename(temporary, directory.join(file)).unwrap();
}

async fn problems(host: &Host) -> Vec<Value> {
    host.admin.get_json("/v1/workers").await["problems"].as_array().unwrap().clone()
}

#[tokio::test]
async fn a_worker_comes_with_its_file_and_goes_with_it_when_its_streams_have_ended() {
    let (host, directory) = over(&[]).await;
    host.http.post(COMPLETIONS, completion(1).to_string()).await.is_error(404, "model_not_found");
    put(directory.path(), "a.toml", "url = 'mock://a?model=m'\nlabels = { zone = 'x' }\n");
    eventually("it serves", async || {
        (host.http.post(COMPLETIONS, completion(1).to_string()).await.status == StatusCode::OK).then_some(())
    })
    .await;
    let source = workers(&host).await[0]["source"].as_str().unwrap().to_owned();
    assert_eq!(source, format!("file:{}", directory.path().display()));

    let stream = host.http.open(COMPLETIONS, &streamed(completion(200))).await;
    fs::remove_file(directory.path().join("a.toml")).unwrap();
    workers_until(&host, "it is drained", |rows| rows.iter().all(|row| row["state"] == "draining")).await;
    let refused = host.http.post(COMPLETIONS, completion(1).to_string()).await;
    assert!(!refused.status.is_success(), "{}", refused.text());
    assert_eq!(tokens::count(&stream.streamed().await.unwrap().text()), Ok(200), "its stream was not cut");
    workers_until(&host, "it is gone", <[Value]>::is_empty).await;
}

#[tokio::test]
async fn metrics_forget_the_workers_that_are_gone_and_no_others() {
    let (host, directory) = over(&["--worker", "mock://stays?model=m&speedup=50"]).await;
    let given = async |worker: &str| host.http.metric("dynamo_host_worker_requests_total", &[("worker", worker)]).await;
    for pod in ["pod-1", "pod-2", "pod-3"] {
        put(directory.path(), "pod.toml", &format!("name = '{pod}'\nurl = 'mock://{pod}?model=m&speedup=50'\n"));
        workers_until(&host, "the pod is another", |rows| {
            rows.len() == 2 && rows.iter().any(|row| row["name"] == pod && row["state"] == "healthy")
        })
        .await;
        eventually("both were asked", async || {
            let kept = given("stays").await;
            host.serves(2).await;
            assert!(given("stays").await >= kept, "counters of those who stay go on");
            (given(pod).await >= 1.0 && kept >= 1.0).then_some(())
        })
        .await;
    }
    let page = host.http.get("/metrics").await.text();
    assert!(page.contains("worker=\"stays\"") && page.contains("worker=\"pod-3\""), "{page}");
    assert!(!page.contains("pod-1") && !page.contains("pod-2"), "{page}");
    assert_eq!(host.admin.metric("dynamo_host_worker_requests_total", &[("worker", "pod-3")]).await, given("pod-3").await);
}

#[tokio::test]
async fn a_broken_file_leaves_its_worker_and_is_shown() {
    let (host, directory) = over(&["--worker", "mock://fixed?model=other"]).await;
    put(directory.path(), "a.toml", "url = 'mock://a?model=m&speedup=50'\n");
    workers_until(&host, "it is healthy", |rows| rows.len() == 2 && rows.iter().all(|row| row["state"] == "healthy")).await;
    put(directory.path(), "a.toml", "url = 'mock://a?model=m&speedup=50'\ncolour = 'red'\n");
    put(directory.path(), "b.toml", "url = 'mock://fixed?model=m'\n");
    let problems = eventually("both are shown", async || Some(problems(&host).await).filter(|it| it.len() == 2)).await;
    assert_eq!(problems[0]["place"], "a.toml");
    assert!(problems[0]["reason"].as_str().unwrap().contains("colour"), "{problems:?}");
    assert!(problems[1]["reason"].as_str().unwrap().contains("from static"), "{problems:?}");
    host.serves(2).await;
    let list = host.cli(&["worker", "list"]).await;
    assert!(list.succeeded().contains("problem with file:") && list.stdout.contains("colour"), "{}", list.stdout);
    let logged = host.process.log().matches("colour").count();
    assert!(logged <= 2, "told once, in a few lines: {}", host.process.log());
    put(directory.path(), "a.toml", "url = 'mock://a?model=n&speedup=50'\n");
    fs::remove_file(directory.path().join("b.toml")).unwrap();
    eventually("all is well", async || self::problems(&host).await.is_empty().then_some(())).await;
    workers_until(&host, "it is another", |rows| rows.iter().any(|row| row["model"] == "n" && row["state"] == "healthy")).await;
}

#[tokio::test]
async fn a_worker_of_the_configuration_can_move_to_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let (files, config) = (directory.path().join("workers"), directory.path().join("host.toml"));
    fs::create_dir(&files).unwrap();
    fs::write(&config, "[[worker]]\nurl = 'mock://a?model=m&speedup=50'\n").unwrap();
    let source = format!("file:{}", files.display());
    let host = Host::start(&["--config", config.to_str().unwrap(), "--discovery", &source]).await;
    put(&files, "a.toml", "url = 'mock://a?model=m&speedup=50'\n");
    eventually("it is there already", async || Some(problems(&host).await).filter(|it| it.len() == 1)).await;
    fs::write(&config, "").unwrap();
    let moved = |rows: &[Value]| rows.len() == 1 && rows[0]["source"] == source.as_str() && rows[0]["state"] == "healthy";
    workers_until(&host, "it is the file's", moved).await;
    assert!(problems(&host).await.is_empty());
    host.serves(2).await;
}

#[tokio::test]
async fn a_token_may_come_after_its_worker_and_change() {
    let engine = Scripted::answering(whole_answer("200 OK", r#"{"choices":[]}"#)).await;
    let (host, directory) = over(&[]).await;
    let token = directory.path().join("token");
    let (url, file) = (engine.url(), token.to_str().unwrap());
    put(directory.path(), "a.toml", &format!("url = '{url}'\nname = 'a'\nmodel = 'm'\nbearer_file = '{file}'\n"));
    eventually("it is missing", async || problems(&host).await.iter().any(|it| it["place"] == "a.toml").then_some(())).await;
    for now in ["first", "second"] {
        put(directory.path(), "token", now);
        eventually("it is sent", async || {
            host.http.post(COMPLETIONS, completion(1).to_string()).await;
            let sent = format!("Bearer {now}").to_lowercase();
            engine.received().iter().any(|received| received.head.to_lowercase().contains(&sent)).then_some(())
        })
        .await;
    }
    assert!(problems(&host).await.is_empty());
    assert!(!host.process.log().contains("second"), "{}", host.process.log());
}

#[tokio::test]
async fn files_that_are_there_at_the_start_serve_at_once() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        put(directory.path(), &format!("{name}.toml"), &format!("url = 'mock://{name}?model=m&speedup=50'\n"));
    }
    fs::write(directory.path().join("b.toml~"), "an editor's").unwrap();
    let source = format!("file:{}", directory.path().display());
    let host = Host::start(&["--discovery", &source]).await;
    assert_eq!(workers(&host).await.len(), 2);
    host.serves(3).await;
}

#[tokio::test]
async fn a_source_that_cannot_be_is_refused() {
    let serve = ["serve", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--discovery"];
    let refuses = async |source: &str, says: &[&str]| run(&[&serve[..], &[source]].concat()).await.failed(2, says);
    refuses("file:/nowhere/workers", &["/nowhere/workers", "make it"]).await;
    refuses("dns:x", &["dns:x", "file:DIRECTORY", "kubernetes:"]).await;
    #[cfg(not(feature = "kubernetes"))]
    refuses("kubernetes:prod/app=vllm", &["kubernetes:prod/app=vllm", "--features kubernetes"]).await;
}
