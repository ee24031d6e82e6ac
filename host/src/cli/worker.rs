//! `dynamo-host worker`: who serves, and who shall not.
#![allow(clippy::print_stdout)]

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;
use serde_json::Value;

use super::{
    AdminFlags, Output,
    admin::{call, list_of, path_segment, print_not_audited, text},
};

/// How often is looked whether a drained worker has finished.
const LOOK_EVERY: Duration = Duration::from_millis(200);

pub(super) async fn list(links: bool, admin: &AdminFlags, output: Output) -> Result<(), String> {
    let answer = call(admin, Method::GET, "/v1/workers", Bytes::new()).await?;
    print(&answer, output);
    if links && output != Output::Json {
        print_links(&answer);
    }
    Ok(())
}

pub(super) async fn drain(
    name: &str,
    wait: Option<u64>,
    grace: Option<u64>,
    admin: &AdminFlags,
    output: Output,
) -> Result<(), String> {
    let what = grace.map_or_else(|| "drain".to_owned(), |seconds| format!("drain?grace_s={seconds}"));
    let mut answer = change(name, &what, admin).await?;
    let begun = Instant::now();
    while let Some(seconds) = wait {
        let active: u64 = list_of(&answer["workers"]).iter().filter_map(|worker| worker["active_requests"].as_u64()).sum();
        if active == 0 {
            break;
        }
        if begun.elapsed() >= Duration::from_secs(seconds) {
            return Err(format!("worker {name:?} is drained, but has {active} requests after {seconds} s; wait on, or stop it"));
        }
        tokio::time::sleep(LOOK_EVERY).await;
        // Drained already: the answer is how it stands now. One that is gone has finished, too.
        match change(name, "drain", admin).await {
            Ok(now) => answer = now,
            Err(reason) if reason.contains("there is no worker") => break,
            Err(reason) => return Err(reason),
        }
    }
    print(&answer, output);
    Ok(())
}

pub(super) async fn resume(name: &str, admin: &AdminFlags, output: Output) -> Result<(), String> {
    print(&change(name, "resume", admin).await?, output);
    Ok(())
}

async fn change(name: &str, what: &str, admin: &AdminFlags) -> Result<Value, String> {
    call(admin, Method::POST, &format!("/v1/workers/{}/{what}", path_segment(name)), Bytes::new()).await
}

fn print(answer: &Value, output: Output) {
    if output == Output::Json {
        println!("{answer:#}");
    } else {
        print_workers(answer);
        print_not_audited(answer);
    }
}

/// A table of workers, and what is wrong with where they come from.
pub(super) fn print_workers(answer: &Value) {
    let workers = list_of(&answer["workers"]);
    let width = |key: &str, least: usize| workers.iter().map(|it| text(&it[key]).chars().count()).fold(least, usize::max);
    let (name, model, source) = (width("name", 6), width("model", 5), width("source", 6));
    let line = |cells: [String; 14]| {
        let [n, m, r, role, k, st, a, s, q, kv, age, prefixes, src, trouble] = cells;
        let line = format!(
            "{n:<name$}  {m:<model$}  {r:>4}  {role:<10}  {k:<8}  {st:<11}  {a:>6}  {s:>8}  {q:>6}  {kv:>8}  {age:>8}  {prefixes:<18}  {src:<source$}  {trouble}"
        );
        println!("{}", line.trim_end());
    };
    let head = [
        "worker", "model", "rank", "role", "kind", "state", "active", "served", "queued", "kv free", "load age", "prefixes",
        "source", "trouble",
    ];
    line(head.map(str::to_owned));
    for worker in workers {
        line([
            text(&worker["name"]),
            text(&worker["model"]),
            number(&worker["rank"]),
            text(&worker["role"]),
            text(&worker["kind"]),
            text(&worker["state"]),
            number(&worker["active_requests"]),
            number(&worker["served"]),
            number(&worker["queued_requests"]),
            share(&worker["kv_tokens_free"], &worker["kv_tokens_total"]),
            worker["load_age_ms"].as_u64().map_or_else(|| "-".to_owned(), |ms| format!("{:.1} s", ms as f64 / 1e3)),
            prefixes(&worker["kv"]),
            text(&worker["source"]),
            [&worker["trouble"], &worker["load_trouble"], kv_trouble(&worker["kv"])]
                .into_iter()
                .find_map(Value::as_str)
                .or_else(|| (worker["handoff"]["state"] == "checking").then_some("its hand-offs are being checked"))
                .map_or_else(String::new, crate::text::plain),
        ]);
        let adapters: Vec<String> = list_of(&worker["adapters"]).iter().map(text).collect();
        if !adapters.is_empty() {
            println!("{:<name$}  adapters {}", "", adapters.join(", "));
        }
    }
    for model in list_of(&answer["disaggregation"]) {
        let reason = model["reason"].as_str().unwrap_or("prefill and decode are apart, where the policy wants that");
        println!("model {}: {}", text(&model["model"]), crate::text::plain(reason));
    }
    for problem in list_of(&answer["problems"]) {
        println!("problem with {}, {}: {}", text(&problem["source"]), text(&problem["place"]), text(&problem["reason"]));
    }
}

/// The ways that KV has gone.
fn print_links(answer: &Value) {
    let links = list_of(&answer["links"]);
    if links.is_empty() {
        return println!("no KV has gone between workers yet");
    }
    let end = |name: &Value, rank: &Value| match rank.as_u64() {
        None | Some(0) => text(name),
        Some(rank) => format!("{}#{rank}", text(name)),
    };
    println!();
    for link in links {
        let known =
            |value: &Value, unit: &str| value.as_f64().map_or_else(|| "-".to_owned(), |value| format!("{value:.0} {unit}"));
        let avoided = link["avoided_ms"]
            .as_u64()
            .map_or_else(String::new, |ms| format!("  it keeps failing: left alone for {:.0} s", (ms as f64 / 1e3).ceil()));
        println!(
            "{} -> {}  {}  {}  {:.0} % failed{avoided}",
            end(&link["from"], &link["from_rank"]),
            end(&link["to"], &link["to_rank"]),
            known(&link["handoff_ms"], "ms"),
            known(&link["tokens_per_second"], "tokens/s"),
            100.0 * link["error_rate"].as_f64().unwrap_or_default(),
        );
    }
}

/// Where what is known of a worker's cached prefixes comes from, and how many blocks that are.
fn prefixes(kv: &Value) -> String {
    match (kv["source"].as_str(), kv["blocks"].as_u64()) {
        (Some("none") | None, _) => "-".to_owned(),
        (Some(_), _) if kv["stale"] == true => "stale".to_owned(),
        (Some(source), blocks) => format!("{source} {}", blocks.unwrap_or_default()),
    }
}

/// What is wrong with the events of an engine that tells; that others don't is no trouble.
fn kv_trouble(kv: &Value) -> &Value {
    if kv["source"] == "events" { &kv["trouble"] } else { &Value::Null }
}

fn number(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".to_owned(), |number| number.to_string())
}

fn share(part: &Value, whole: &Value) -> String {
    match (part.as_f64(), whole.as_f64()) {
        (Some(part), Some(whole)) if whole > 0.0 => format!("{:.0} %", 100.0 * part / whole),
        _ => "-".to_owned(),
    }
}
