//! `dynamo-host config check`: all of a configuration file that can be checked without a network.
#![allow(clippy::print_stdout)]

use std::{collections::BTreeSet, fs, path::Path, sync::Arc};

use dynamo_engine_api::Protocol;
use dynamo_host_core::SlotName;
use dynamo_host_policy::{Limits, Now, PolicyRuntime, SlotState};
use serde_json::{Value, json};

use super::Output;
use crate::{
    auth::Keys, config::Config, models::TokenizerSource, policies::Seed, roster, telemetry, text::plain, tls::ServerTls, tokenize,
};

/// What is wrong, and what may be.
#[derive(Default)]
struct Verdict {
    errors: Vec<String>,
    warnings: Vec<String>,
}

pub(super) fn check(file: &Path, output: Output) -> Result<(), String> {
    // What cannot be read as a whole has one error.
    let config = match Config::of_file(file) {
        Ok(config) => config,
        Err(error) => return fail(file, output, &json!(null), Verdict { errors: vec![error.to_string()], warnings: Vec::new() }),
    };
    let mut verdict = Verdict::default();
    check_workers(&config, &mut verdict);
    check_names(&config, &mut verdict);
    check_files(&config, &mut verdict);
    let shown = shown(&config);
    if !verdict.errors.is_empty() {
        return fail(file, output, &shown, verdict);
    }
    if output == Output::Json {
        println!("{:#}", json!({ "ok": true, "errors": [], "warnings": verdict.warnings, "config": shown }));
        return Ok(());
    }
    println!("{}: can be run", file.display());
    print_shown(&shown);
    verdict.warnings.iter().for_each(|warning| println!("warning: {warning}"));
    Ok(())
}

fn fail(file: &Path, output: Output, shown: &Value, verdict: Verdict) -> Result<(), String> {
    let Verdict { errors, warnings } = verdict;
    let count = errors.len();
    if output == Output::Json {
        println!("{:#}", json!({ "ok": false, "errors": errors, "warnings": warnings, "config": shown }));
        return Err(format!("{} cannot be run: {count} errors", file.display()));
    }
    warnings.iter().for_each(|warning| println!("warning: {warning}"));
    match errors.as_slice() {
        [only] => Err(only.clone()),
        _ => Err(format!("{} cannot be run:\n  {}", file.display(), errors.join("\n  "))),
    }
}

fn check_workers(config: &Config, verdict: &mut Verdict) {
    // Each wrong worker, not only the first.
    let wrong = config.workers.iter().filter_map(|worker| Some((worker, roster::check(worker).err()?)));
    verdict.errors.extend(wrong.map(|(worker, reason)| format!("worker {:?}: {reason}", worker.name)));
    if verdict.errors.is_empty()
        && let Err(error) = roster::check_all(&config.workers, config.limits.max_workers)
    {
        verdict.errors.push(error.to_string());
    }
    if config.workers.is_empty() && config.discovery.is_empty() {
        verdict.warnings.push("there is no worker; give some with --worker or --discovery".to_owned());
    }
    for discovery in &config.discovery {
        verdict.errors.extend(discovery.check().err().map(|reason| format!("discovery {:?}: {reason}", discovery.to_string())));
    }
}

/// Names that lead to no model, as far as that is known without asking engines.
fn check_names(config: &Config, verdict: &mut Verdict) {
    let known: Option<BTreeSet<&str>> = config.workers.iter().map(|worker| worker.model.as_deref()).collect();
    let Some(known) = known.filter(|known| !known.is_empty() && config.discovery.is_empty()) else { return };
    let unknown = config.models.targets().filter(|(_, target)| !known.contains(target));
    verdict.warnings.extend(unknown.map(|(name, target)| {
        format!("models.{name:?} leads to {target:?}, which no worker has as its model; adapters are not known here")
    }));
}

/// Files that the configuration names.
fn check_files(config: &Config, verdict: &mut Verdict) {
    for (name, reason) in tokenize::check(&config.tokenizers) {
        verdict.errors.push(format!("models.{name:?}.tokenizer: {reason}"));
    }
    if let Err(reason) = telemetry::parse(&config.log_level) {
        verdict.errors.push(format!("log_level: {reason}"));
    }
    let door = &config.door;
    if let Some(Err(error)) = door.keys_file.as_deref().map(Keys::load) {
        verdict.errors.push(format!("auth.keys_file: {error}"));
    }
    for (section, files) in [("tls", &door.tls), ("admin_tls", &door.admin_tls)] {
        if let Some(Err(error)) = files.clone().map(ServerTls::load) {
            verdict.errors.push(format!("{section}: {error}"));
        }
    }
    for (slot, seed) in [(SlotName::ROUTING, &config.routing.seed), (SlotName::ADMISSION, &config.admission.seed)] {
        let Some(Seed::File { path, settings }) = seed else { continue };
        let loaded = fs::read(path).map_err(|error| error.to_string()).and_then(|bytes| {
            let runtime =
                PolicyRuntime::new(Limits::default(), Arc::new(Now::default), None).map_err(|error| error.to_string())?;
            runtime.load(&bytes, settings, Arc::new(SlotState::of(&slot))).map_err(|error| plain(&error.to_string()))
        });
        verdict.errors.extend(loaded.err().map(|reason| format!("{slot}.policy {path:?}: {reason}")));
    }
    if let Some(state_dir) = &config.state_dir
        && fs::metadata(state_dir).is_ok_and(|metadata| !metadata.is_dir())
    {
        verdict.errors.push(format!("state_dir {state_dir:?} is no directory; name one, or one that can be made"));
    }
}

/// What would run. Of secrets, only where they come from.
fn shown(config: &Config) -> Value {
    let workers: Vec<Value> = config
        .workers
        .iter()
        .map(|worker| {
            json!({
                "name": worker.name, "url": worker.url, "model": worker.model, "role": worker.role, "kind": worker.kind,
                "handoff": worker.handoff.map(Protocol::name), "bootstrap_host": worker.bootstrap_host, "bootstrap_port": worker.bootstrap_port,
                "ranks": worker.ranks, "block_size": worker.block_size, "labels": worker.labels,
                "bearer": worker.bearer.as_ref().map(ToString::to_string), "ca_file": worker.ca_file,
                "forward_priority": worker.forward_priority,
            })
        })
        .collect();
    let names: serde_json::Map<String, Value> =
        config.models.orders().map(|(name, order)| (name.to_owned(), json!(order))).collect();
    let tokenizers = config.tokenizers.iter().map(|(name, source)| {
        let source = match source {
            TokenizerSource::Directory(path) => json!(path),
            TokenizerSource::Engine => json!("engine"),
        };
        (name.clone(), source)
    });
    let tokenizers: serde_json::Map<String, Value> = tokenizers.collect();
    let [routing, admission] = [&config.routing, &config.admission].map(|slot| match &slot.seed {
        None | Some(Seed::Native) => json!("native"),
        Some(Seed::File { path, .. }) => json!(path),
    });
    json!({
        "http": config.http, "admin": config.admin, "admin_token": config.admin_token.as_ref().map(|_| "(set)"),
        "state_dir": config.state_dir, "routing": routing, "admission": admission, "models": names, "tokenizers": tokenizers, "workers": workers,
        "discovery": config.discovery.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

fn print_shown(shown: &Value) {
    for key in ["http", "admin", "admin_token", "state_dir", "routing", "admission"] {
        println!("  {key:<12} {}", shown[key].as_str().unwrap_or("-"));
    }
    for discovery in shown["discovery"].as_array().into_iter().flatten() {
        println!("  {:<12} {}", "discovery", discovery.as_str().unwrap_or_default());
    }
    for (name, order) in shown["models"].as_object().into_iter().flatten() {
        let order: Vec<&str> = order.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        println!("  {:<12} {name} -> {}", "model", order.join(", else "));
    }
    for (name, source) in shown["tokenizers"].as_object().into_iter().flatten() {
        println!("  {:<12} {name} by {}", "tokenizer", source.as_str().unwrap_or_default());
    }
    for worker in shown["workers"].as_array().into_iter().flatten() {
        let known: Vec<String> = worker
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, value)| !matches!(key.as_str(), "name" | "url") && !is_blank(value))
            .map(|(key, value)| format!("{key} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
            .collect();
        println!(
            "  {:<12} {} at {} {}",
            "worker",
            worker["name"].as_str().unwrap_or_default(),
            worker["url"].as_str().unwrap_or_default(),
            known.join(", ")
        );
    }
}

fn is_blank(value: &Value) -> bool {
    value.is_null() || *value == json!(false) || value.as_object().is_some_and(serde_json::Map::is_empty)
}
