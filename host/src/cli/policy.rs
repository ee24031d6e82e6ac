//! `dynamo-host policy check` and `bench`: a component looked at without a running host.
#![allow(clippy::print_stdout)]

use std::{path::Path, sync::Arc};

use dynamo_host_core::answer::Verdict;
use dynamo_host_policy::{Limits, Now, PolicyFault, PolicyRuntime, PolicyVersion, bench, read_component, synthetic};
use serde_json::json;

use super::Output;
use crate::{config::read_settings, text::plain};

/// Sizes that `check` decides for.
const SIZES: [u32; 4] = [1, 4, 64, 1024];

fn load(file: &Path, settings: Option<&str>) -> Result<Arc<PolicyVersion>, String> {
    let settings =
        settings.map(|settings| read_settings("--settings", settings)).transpose().map_err(|error| error.to_string())?;
    let bytes =
        read_component(file, Limits::default().component_bytes).map_err(|error| format!("{}: {error}", file.display()))?;
    let runtime = PolicyRuntime::new(Limits::default(), Arc::new(Now::default), None).map_err(|error| error.to_string())?;
    let settings = settings.as_deref().unwrap_or("{}");
    runtime.load(&bytes, settings, Arc::default()).map_err(|error| format!("{}: {}", file.display(), plain(&error.to_string())))
}

fn failed(candidates: u32, fault: &PolicyFault) -> String {
    format!("it failed with {candidates} candidates: {}", plain(&fault.to_string()))
}

pub(super) fn check(file: &Path, settings: Option<&str>, output: Output) -> Result<(), String> {
    let version = load(file, settings)?;
    let schema = version.settings_schema().map_err(|fault| format!("settings-schema failed: {}", plain(&fault.to_string())))?;
    let mut trial = version.trial().map_err(|fault| plain(&fault.to_string()))?;
    let mut decisions = Vec::new();
    for candidates in SIZES {
        let routed =
            trial.route(&synthetic::route_call(&synthetic::fleet(candidates), 1)).map_err(|fault| failed(candidates, &fault))?;
        let answer = match routed.verdict {
            Verdict::Place(ranking) => format!("place on {} of {candidates}", ranking.rows().len()),
            Verdict::Hold { at_most_ms } => format!("hold for {at_most_ms} ms"),
            Verdict::Reject(rejection) => format!("reject with {}", rejection.status),
        };
        decisions.push((candidates, answer, routed.fuel));
    }
    let limit = Limits::default().decision_fuel;
    let inspection = version.inspection();
    if output == Output::Json {
        let decisions: Vec<_> = decisions
            .iter()
            .map(|(candidates, answer, fuel)| json!({ "candidates": candidates, "answer": answer, "fuel": fuel }))
            .collect();
        let schema: serde_json::Value = serde_json::from_str(&schema).unwrap_or_default();
        println!("{:#}", json!({ "policy": inspection, "settings_schema": schema, "fuel_limit": limit, "decisions": decisions }));
        return Ok(());
    }
    println!("{}: a policy that can be activated", file.display());
    println!(
        "  name      {} by {}",
        inspection.name,
        if inspection.name.author.is_empty() { "-" } else { &inspection.name.author }
    );
    println!("  digest    {}", inspection.digest);
    println!("  size      {} kB", inspection.bytes / 1000);
    println!("  world     {}", inspection.world);
    println!("  imports   {}", inspection.imports.join(", "));
    println!("  settings  {}", schema.replace(char::is_control, " "));
    for (candidates, answer, fuel) in decisions {
        println!(
            "  probe     {candidates:>4} candidates: {answer}, fuel {fuel} ({:.2} % of its bound)",
            100.0 * fuel as f64 / limit as f64
        );
    }
    Ok(())
}

pub(super) fn bench(file: &Path, settings: Option<&str>, sizes: &[u32], output: Output) -> Result<(), String> {
    let version = load(file, settings)?;
    let mut rows = Vec::new();
    for &candidates in sizes {
        let policy = bench::policy(&version, candidates).map_err(|fault| failed(candidates, &fault))?;
        rows.push((policy, bench::native_fallback(candidates)));
    }
    if output == Output::Json {
        let results: Vec<_> = rows.iter().map(|(policy, native)| json!({ "policy": policy, "native": native })).collect();
        println!(
            "{:#}",
            json!({ "policy": version.label().to_string(), "digest": version.digest().to_string(), "results": results })
        );
        return Ok(());
    }
    println!("{} beside the native fallback (least-loaded), per decision, columns built:", version.label());
    println!("{:>12} {:>14} {:>12} {:>10} {:>16} {:>12}", "candidates", "policy median", "p99", "fuel", "native median", "p99");
    for (policy, native) in rows {
        println!(
            "{:>12} {:>11.2} µs {:>9.2} µs {:>10} {:>13.2} µs {:>9.2} µs",
            policy.candidates,
            policy.median_ns / 1e3,
            policy.p99_ns / 1e3,
            policy.fuel,
            native.median_ns / 1e3,
            native.p99_ns / 1e3
        );
    }
    Ok(())
}
