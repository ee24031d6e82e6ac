//! Commands that talk to a running host's admin API.
#![allow(clippy::print_stdout)]

use std::{path::Path, time::Duration};

use bytes::Bytes;
use dynamo_host_core::{OnError, SlotName, slot::SlotNameError};
use dynamo_host_policy::{Limits, read_component};
use http::{Method, Request, Uri, header::AUTHORIZATION};
use serde_json::Value;

use super::{AdminFlags, Output};
use crate::{config::read_settings, exchange::exchange, text::plain, tls::client_config};

/// Compiling a large policy takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) async fn activate(
    slot: &str,
    file: &str,
    settings: Option<&str>,
    admin: &AdminFlags,
    output: Output,
) -> Result<(), String> {
    let settings =
        settings.map(|settings| read_settings("--settings", settings)).transpose().map_err(|error| error.to_string())?;
    let slot: SlotName = slot.parse().map_err(|error: SlotNameError| error.to_string())?;
    let path = format!("/v1/slots/{}/policy", path_segment(&slot.to_string()));
    let change = if file == "native" {
        if settings.is_some() {
            return Err("the native fallback takes no --settings".to_owned());
        }
        call(admin, Method::DELETE, &path, Bytes::new()).await?
    } else {
        let max_bytes = Limits::default().component_bytes;
        let component = read_component(Path::new(file), max_bytes).map_err(|error| format!("{file}: {error}"))?;
        let query: String = form_urlencoded::Serializer::new(String::new())
            .extend_pairs(settings.map(|settings| ("settings", settings)))
            .finish();
        call(admin, Method::PUT, &format!("{path}?{query}"), component.into())
            .await
            .map_err(|error| format!("{file}: {error}"))?
    };
    print_change(&change, output);
    Ok(())
}

pub(super) async fn rollback(slot: &str, admin: &AdminFlags, output: Output) -> Result<(), String> {
    let slot: SlotName = slot.parse().map_err(|error: SlotNameError| error.to_string())?;
    let change =
        call(admin, Method::POST, &format!("/v1/slots/{}/rollback", path_segment(&slot.to_string())), Bytes::new()).await?;
    print_change(&change, output);
    Ok(())
}

pub(super) async fn bypass(slot: &str, is_on: bool, admin: &AdminFlags, output: Output) -> Result<(), String> {
    let slot: SlotName = slot.parse().map_err(|error: SlotNameError| error.to_string())?;
    let method = if is_on { Method::PUT } else { Method::DELETE };
    let answer = call(admin, method, &format!("/v1/slots/{}/bypass", path_segment(&slot.to_string())), Bytes::new()).await?;
    if output == Output::Json {
        println!("{answer:#}");
        return Ok(());
    }
    let what = if is_on { "bypassed, the native fallback decides" } else { "not bypassed, its policy decides" };
    println!("{slot}: {what}");
    print_not_audited(&answer);
    if answer["not_kept"].is_string() {
        println!("a restart will forget that: {}", text(&answer["not_kept"]));
    }
    Ok(())
}

pub(super) async fn on_error(slot: &str, mode: OnError, admin: &AdminFlags, output: Output) -> Result<(), String> {
    let slot: SlotName = slot.parse().map_err(|error: SlotNameError| error.to_string())?;
    let path = format!("/v1/slots/{}/on-error?mode={mode}", path_segment(&slot.to_string()));
    let answer = call(admin, Method::PUT, &path, Bytes::new()).await?;
    if output == Output::Json {
        println!("{answer:#}");
    } else {
        println!("{slot}: when its policy fails: {}", describe_on_error(&answer["on_error"]));
        print_not_audited(&answer);
    }
    Ok(())
}

pub(super) async fn list(admin: &AdminFlags, output: Output) -> Result<(), String> {
    let answer = call(admin, Method::GET, "/v1/slots", Bytes::new()).await?;
    if output == Output::Json {
        println!("{answer:#}");
    } else {
        print_slots(&answer);
    }
    Ok(())
}

pub(super) async fn status(admin: &AdminFlags, output: Output) -> Result<(), String> {
    let answer = call(admin, Method::GET, "/v1/status", Bytes::new()).await?;
    if output == Output::Json {
        println!("{answer:#}");
        return Ok(());
    }
    println!("dynamo-host {}, up {} s", text(&answer["version"]), answer["uptime_s"]);
    print_slots(&answer);
    print_config(&answer["config"]);
    print_queue(&answer["queue"]);
    super::worker::print_workers(&answer);
    Ok(())
}

fn print_config(config: &Value) {
    if config["file"].is_string() {
        println!("{:<10} {}, read again {} times", "config", text(&config["file"]), config["reloads"]);
    }
    if config["trouble"].is_string() {
        println!("{:<10} the file as it is now cannot be run: {}", "", text(&config["trouble"]));
    }
    let needs_restart: Vec<String> = list_of(&config["needs_restart"]).iter().map(text).collect();
    if !needs_restart.is_empty() {
        println!("{:<10} count from the next start on: {}", "", needs_restart.join(", "));
    }
}

/// What runs and waits, one line for each model; and of those that wait, whose they are.
fn print_queue(queue: &Value) {
    for pool in list_of(&queue["pools"]) {
        let ms = |key: &str| pool[key].as_f64().map_or_else(|| "-".to_owned(), |ms| format!("{ms:.0} ms"));
        println!(
            "{:<10} {}: {} run, room for {}, {} wait ({} tokens, the oldest for {}, predicted {}), first token p50 {}, p99 {}",
            "queue",
            text(&pool["model"]),
            pool["running"],
            pool["free"].as_u64().map_or_else(|| "any number".to_owned(), |free| free.to_string()),
            pool["queued"],
            pool["queued_tokens"],
            ms("oldest_age_ms"),
            ms("predicted_wait_ms"),
            ms("ttft_p50_ms"),
            ms("ttft_p99_ms"),
        );
        for key in ["classes", "tenants"] {
            let counts = pool[key].as_object().into_iter().flatten();
            let counts: Vec<String> = counts.map(|(name, count)| format!("{} {count}", plain(name))).collect();
            if !counts.is_empty() {
                println!("{:<12}waiting by {key}: {}", "", counts.join(", "));
            }
        }
    }
}

/// A slot's or a worker's name within a path: it may hold slashes.
pub(super) fn path_segment(name: &str) -> String {
    let encoded: String = form_urlencoded::byte_serialize(name.as_bytes()).collect();
    encoded.replace('+', "%20")
}

fn print_change(change: &Value, output: Output) {
    if output == Output::Json {
        println!("{change:#}");
        return;
    }
    println!(
        "{}: {} is active (loaded in {:.1} ms, stored in {:.1} ms, swapped in {:.1} µs)",
        text(&change["slot"]),
        describe(&change["active"]),
        change["load_ms"].as_f64().unwrap_or_default(),
        change["store_ms"].as_f64().unwrap_or_default(),
        change["swap_us"].as_f64().unwrap_or_default()
    );
    print_not_audited(change);
}

fn print_slots(answer: &Value) {
    for slot in list_of(&answer["slots"]) {
        print_version(&text(&slot["slot"]), "active", &slot["active"]);
        if slot["bypass"] == true {
            println!("{:<20}bypassed: the native fallback decides, whatever is active", "");
        }
        println!("{:<20}when it fails: {}", "", describe_on_error(&slot["on_error"]));
        if slot["trouble"].is_string() {
            println!("{:<20}trouble: {}", "", text(&slot["trouble"]));
        }
        for previous in list_of(&slot["previous"]) {
            print_version("", "before", previous);
        }
    }
}

fn print_version(slot: &str, role: &str, version: &Value) {
    println!("{slot:<10} {role:<8} {:<40} {} calls", describe(version), version["calls"]);
    if let Some(settings) = version["settings"].as_object().filter(|settings| !settings.is_empty()) {
        println!("{:<20}settings {}", "", Value::Object(settings.clone()));
    }
    for (cause, count) in version["fallbacks"].as_object().into_iter().flatten() {
        println!("{:<20}did not decide, {cause}: {count}", "");
    }
    for (cause, count) in version["observe_failures"].as_object().into_iter().flatten() {
        println!("{:<20}did not learn, {cause}: {count}", "");
    }
    print_quarantine(version);
    if version["last_fault"].is_string() {
        println!("{:<20}last fault: {}", "", text(&version["last_fault"]));
    }
}

fn print_quarantine(version: &Value) {
    let seconds = |value: &Value| value.as_f64().unwrap_or_default();
    let quarantine = &version["quarantine"];
    if quarantine.is_object() {
        let trial = match seconds(&quarantine["next_trial_in_s"]) {
            0.0 => "the next request is its trial".to_owned(),
            wait => format!("next trial in {wait:.1} s"),
        };
        println!(
            "{:<20}quarantined for {:.1} s, cause {}: {} of {} calls had failed; {} trials failed; {trial}",
            "",
            seconds(&quarantine["for_s"]),
            text(&quarantine["cause"]),
            quarantine["faults"],
            quarantine["calls"],
            quarantine["failed_trials"],
        );
    } else if version["quarantines"].as_u64().is_some_and(|count| count > 0) {
        let times = version["quarantines"].as_u64().unwrap_or_default();
        println!("{:<20}was quarantined {times} time{}", "", if times == 1 { "" } else { "s" });
    }
}

fn describe_on_error(mode: &Value) -> String {
    let meaning = match mode.as_str() {
        Some("fallback") => "the native fallback decides",
        Some("last-good") => "the newest earlier version that is sound decides",
        Some("closed") => "the request is refused",
        _ => "unknown",
    };
    format!("{} ({meaning})", text(mode))
}

fn describe(version: &Value) -> String {
    match version["digest"].as_str() {
        Some(digest) => format!("{} ({})", text(&version["policy"]), digest.get(..8).unwrap_or(digest)),
        None => text(&version["policy"]),
    }
}

/// A text for the terminal: policies and engines wrote some of them.
pub(super) fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| "-".to_owned(), plain)
}

pub(super) fn list_of(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

pub(super) async fn call(admin: &AdminFlags, method: Method, path: &str, body: Bytes) -> Result<Value, String> {
    let base = admin.admin.trim_end_matches('/');
    let uri: Uri = format!("{base}{path}").parse().map_err(|error| format!("--admin {base:?} is not a URL: {error}"))?;
    let tls = match uri.scheme_str() {
        Some("http") => None,
        Some("https") => {
            let identity = admin.admin_cert.as_deref().zip(admin.admin_key.as_deref());
            Some(client_config(admin.admin_ca.as_deref(), identity).map_err(|error| error.to_string())?)
        }
        _ => return Err(format!("--admin {base:?} is not a URL such as http://127.0.0.1:8081")),
    };
    let mut request = Request::builder().method(method).uri(uri);
    if let Some(token) = &admin.token {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    let request = request.body(body).map_err(|error| error.to_string())?;
    let exchange = async {
        let answer = exchange(request, tls.as_ref()).await.map_err(|error| {
            format!("cannot reach the admin API at {base}: {error}; is the host running, and is this its --admin address?")
        })?;
        let status = answer.status();
        let value: Value = serde_json::from_slice(answer.body()).map_err(|_| {
            format!("{base} answered {status} with what is not its JSON; is this the --admin address, not the front door?")
        })?;
        if status.is_success() {
            return Ok(value);
        }
        Err(value["error"]["message"].as_str().map_or_else(|| format!("the admin API answered {status}"), plain))
    };
    tokio::time::timeout(PATIENCE, exchange)
        .await
        .unwrap_or_else(|_| Err(format!("the admin API at {base} did not answer within {} s", PATIENCE.as_secs())))
}

/// A change counts though it could not be written down, and whoever made it must know.
pub(super) fn print_not_audited(answer: &Value) {
    if answer["not_audited"].is_string() {
        println!("it is done, but not in the audit file: {}", text(&answer["not_audited"]));
    }
}
